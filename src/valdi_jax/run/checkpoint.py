"""The run directory: configuration, checkpoints and the replay's episodes.

    RUN/config.json               the resolved configuration
    RUN/checkpoints/00000025/     after 25 episodes:
        params/                     the online networks, all that acting needs (Orbax)
        training/                   EMA, optimizer, step and key (Orbax)
        progress.json               counters
        manifest.json               checksums of these files and of the replay's
    RUN/replay/00000024.npz       one episode, written once
    RUN/nonfinite/00000731.npz    the batch of an update whose loss was not finite
    RUN/metrics.jsonl             one line an episode
    RUN/evaluations.jsonl         one line an evaluation
    RUN/events.out.tfevents.*     TensorBoard
    RUN/lock                      held by the process that trains

Everything random follows from the seed and the counters, so there is no other state to keep. What
is found damaged is set aside: its name then begins with ``damaged-``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import types
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from valdi_jax.config import Config, added_since, from_dict, to_dict
from valdi_jax.data.episode import Episode
from valdi_jax.data.source import Progress
from valdi_jax.errors import UsageError
from valdi_jax.model import init_params
from valdi_jax.observation import Observation
from valdi_jax.run import agents
from valdi_jax.run.manifest import (
    MANIFEST,
    content_digest,
    describe_files,
    file_digest,
    find_damage,
    flush,
    read_signed,
    write_atomic,
    write_json,
    write_signed,
)
from valdi_jax.types import AgentState, Batch, Params
from valdi_jax.updates import init_state

_UNFINISHED = ("partial", "replaced")  # prefixes of checkpoints that do not count

# What reading a damaged .npz file raises, depending on where the damage is.
_DAMAGED = (
    *(OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, SyntaxError),
    *(RuntimeError, OverflowError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
)


def create_run(run_dir: Path, config: Config, state: AgentState | None = None) -> None:
    """Make a run directory that holds the configuration.

    Args:
        run_dir: a directory without a run.
        config: the run's configuration.
        state: agent that the run starts from, where that does not follow from the configuration.
            Its checkpoint is there before the directory counts as a run.

    Raises:
        UsageError: if the directory cannot be written, or already holds a run.
    """
    try:
        if (run_dir / "config.json").exists():
            raise UsageError(
                f"{run_dir} already holds a run: continue it with --resume {run_dir} (from Python "
                "with resume=True)"
            )
        run_dir.mkdir(parents=True, exist_ok=True)
        if state is not None:
            save(run_dir, state, Progress(), keep=1, replay={})
        save_config(run_dir, config)
    except OSError as error:
        raise UsageError(f"cannot write to {run_dir}: {error.strerror or error}") from error


def save_config(run_dir: Path, config: Config) -> None:
    """Write the configuration of a run."""
    write_json(run_dir / "config.json", to_dict(config))


def load_config(run_dir: Path) -> Config:
    """The configuration of a run.

    Raises:
        UsageError: if this is not a run directory, or its configuration is not valid.
    """
    path = Path(run_dir) / "config.json"
    try:
        if not path.is_file():
            raise UsageError(f"{run_dir} is not a run directory: it has no config.json")
        if (Path(run_dir) / agents.TENSORS).exists():
            raise UsageError(f"{run_dir} is an agent, not a run: start one with --init-from")
        data = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} is not a valid configuration: {error}") from error
    try:
        return from_dict(data)
    except UsageError as error:
        raise UsageError(f"{path} is not a valid configuration: {error}") from error


def options_since(run_dir: Path) -> list[str]:
    """Options that there were not yet when a run began: they have their defaults there."""
    return added_since(json.loads((run_dir / "config.json").read_text()))


def save(
    run_dir: Path, state: AgentState, progress: Progress, *, keep: int, replay: dict[int, str]
) -> Path:
    """Write a checkpoint, complete or not at all, and delete the oldest beyond ``keep``.

    Args:
        run_dir: directory of the run.
        state: the agent.
        progress: the run's counters.
        keep: checkpoints that stay, this one included.
        replay: checksums of the episodes in the replay, as `save_episode` gives them.

    Returns: the checkpoint's directory.

    Raises:
        OSError: if it cannot be written; those before it stay.
    """
    final = run_dir / "checkpoints" / f"{progress.episodes:08d}"
    partial, replaced = (final.with_name(f"{kind}-{final.name}") for kind in _UNFINISHED)
    for kind in _UNFINISHED:  # what an earlier kill may have left
        for leftover in final.parent.glob(f"{kind}-*"):
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    training = _training_tree(state)
    counters = dataclasses.replace(progress, seconds=0.0)  # the same whatever it took
    content = (state.params, training, dataclasses.asdict(counters), sorted(replay.items()))
    try:
        _save_tree(partial / "params", state.params)
        _save_tree(partial / "training", training)
        write_json(partial / "progress.json", dataclasses.asdict(progress))
        _write_manifest(partial, updates=int(state.step), replay=replay, content=content)
        flush(partial)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # what a full disk is least in need of
        raise
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    flush(final.parent, recursive=False)
    for old in [replaced, *checkpoints(run_dir)[:-keep]]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def save_params(run_dir: Path, params: Params) -> Path:
    """Write a checkpoint that can be evaluated but not trained on."""
    final = run_dir / "checkpoints" / "00000000"
    _save_tree(final / "params", params)
    write_json(final / "progress.json", dataclasses.asdict(Progress()))
    _write_manifest(final, updates=0, replay={}, content=params)
    return final


def _write_manifest(directory: Path, *, updates: int, replay: dict[int, str], content: Any) -> None:
    body = {
        "updates": updates,
        "content": content_digest(jax.tree.map(_hashable, content)),
        "files": describe_files(directory),
        "replay": {str(number): digest for number, digest in sorted(replay.items())},
    }
    write_signed(directory / MANIFEST, body)


def _hashable(leaf: Any) -> Any:
    return np.frombuffer(leaf.encode(), np.uint8) if isinstance(leaf, str) else leaf


def verify(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint's own files, a sentence each; nothing if it is whole."""
    try:
        replay_digests(checkpoint)
        return find_damage(checkpoint, read_signed(checkpoint / MANIFEST)["files"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [str(error)]


def verify_replay(run_dir: Path, checkpoint: Path) -> dict[int, str]:
    """What is wrong with the episodes that a checkpoint goes on with, by their numbers."""
    problems = {}
    for number, digest in replay_digests(checkpoint).items():
        path = _episode_path(run_dir, number)
        if not path.is_file():
            problems[number] = f"{path} is missing"
        elif file_digest(path) != digest:
            problems[number] = f"{path} differs from its checksum"
    return problems


def replay_digests(checkpoint: Path) -> dict[int, str]:
    """Checksums of the episodes in the replay of a checkpoint that is whole, oldest first."""
    replay = read_signed(checkpoint / MANIFEST)["replay"]  # its keys are text, in the order of text
    return dict(sorted((int(number), digest) for number, digest in replay.items()))


class Recovered(NamedTuple):
    """What a run goes on from."""

    checkpoint: Path | None = None  # None if the run has not had one
    digests: Mapping[int, str] = types.MappingProxyType({})  # of the episodes to go on with
    sentences: Sequence[str] = ()  # what was found damaged


def recover(run_dir: Path) -> Recovered:
    """The newest checkpoint that is whole, with its replay if any has a whole one.

    What is damaged is set aside, and so are newer checkpoints than the one that is used.

    Raises:
        UsageError: if there are checkpoints, but none that is whole.
    """
    for replaced in (run_dir / "checkpoints").glob("replaced-" + "[0-9]" * 8):
        final = replaced.with_name(replaced.name.removeprefix("replaced-"))
        if not final.exists():  # a kill came after it was moved, before the new one was there
            replaced.rename(final)
    found = checkpoints(run_dir)
    damage = {path: verify(path) for path in found}
    whole = [path for path in found if not damage[path]]
    lost = {path: verify_replay(run_dir, path) for path in whole}
    sentences = [sentence for path in found for sentence in damage[path]]
    if not whole:
        if found:
            raise UsageError(f"no checkpoint of {run_dir} is whole: {sentences[-1]}")
        return Recovered()
    used = next((path for path in reversed(whole) if not lost[path]), whole[-1])
    missing = {number: text for path in whole for number, text in lost[path].items()}
    sentences += missing.values()
    for number in missing:
        _set_aside(_episode_path(run_dir, number))
    for path in found:
        if damage[path] or path > used:
            _set_aside(path)
    if sentences:
        sentences.append(f"going on from {used}")
    if lost[used]:
        sentences.append(f"going on without {len(lost[used])} damaged episodes")
    replay = replay_digests(used)
    kept = {n: digest for n, digest in replay.items() if n not in lost[used]}
    return Recovered(used, kept, sentences)


def _set_aside(path: Path) -> None:
    aside = path.with_name(f"damaged-{path.name}")
    if aside.is_dir():
        shutil.rmtree(aside)
    if path.exists():
        path.replace(aside)


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold a run directory for this process; the system lets go of it however the process ends.

    Raises:
        UsageError: if another process holds it.
    """
    with open(run_dir / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UsageError(
                f"{run_dir} is in use by the process {file.read().strip() or 'that locked it'}"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((Path(run_dir) / "checkpoints").glob("[0-9]" * 8))


def latest(run_dir: Path) -> Path:
    """The newest checkpoint of a run.

    Raises:
        UsageError: if there is none.
    """
    found = checkpoints(run_dir)
    if not found:
        raise UsageError(f"{run_dir} holds no checkpoint yet")
    return found[-1]


def locate(path: Path) -> tuple[Path, Path | None]:
    """The run directory that is meant, and the checkpoint, where it is one of its checkpoints."""
    if path.parent.name == "checkpoints" and path.is_dir():
        return path.parent.parent, path
    return path, None


@dataclasses.dataclass(frozen=True)
class StoredAgent:
    """A trained agent that has been found.

    Attributes:
        name: where it is.
        config: the configuration that it was trained with.
    """

    name: str
    config: Config
    read: Callable[[], Params]

    def load(
        self, observation: Observation | None = None, *, config: Config | None = None
    ) -> Params:
        """Its parameters, on the device.

        Args:
            observation: example that its encoder has to take; if given, all shapes are checked.
            config: what it is to be used with, its own if not given.

        Raises:
            UsageError: if it is damaged, or naming the first parameter that does not fit.
        """
        params = jax.tree.map(jnp.asarray, self.read())
        if observation is not None:
            template = _params_template(observation, config or self.config)
            _check_fit(_shapes(params), _shapes(template), self.name)
        return params


def open_agent(where: Path | str) -> StoredAgent:
    """The agent that is meant by a path or a name.

    Args:
        where: a run directory (its newest checkpoint), one of its checkpoints, an exported agent,
            or the name of one that comes with the package.

    Raises:
        UsageError: if it is none of these, or an exported agent that is damaged.
    """
    where = Path(where)
    exported = agents.locate(where)
    if exported is not None:
        config, params, _ = agents.load(exported)
        return StoredAgent(str(where), config, lambda: params)
    run_dir, found = locate(where)
    if not run_dir.exists():
        raise UsageError(
            f"{where} is not a run directory, nor an agent that comes with the package "
            f"({', '.join(agents.packaged())})"
        )
    config = load_config(run_dir)
    found = found or latest(run_dir)
    return StoredAgent(str(found), config, lambda: read_params(found))


def read_params(checkpoint: Path) -> Params:
    """The online networks of a checkpoint, whatever they are, once it is verified.

    Raises:
        UsageError: if it is damaged.
    """
    for sentence in verify(checkpoint):
        raise UsageError(f"{sentence}: see python -m valdi_jax.checkpoint {locate(checkpoint)[0]}")
    return _load_tree(checkpoint / "params", None)


def _params_template(observation: Observation, config: Config) -> Params:
    return jax.eval_shape(
        lambda key: init_params(key, observation, config=config), jax.random.key(0)
    )


def load_params(checkpoint: Path, observation: Observation, config: Config) -> Params:
    """The online networks of a checkpoint.

    Args:
        checkpoint: its directory, such as `latest` gives.
        observation: example that the encoder is built for.
        config: the run's configuration.

    Raises:
        UsageError: if this is not a checkpoint, or it was made for other shapes.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / "params").is_dir():
        raise UsageError(f"{checkpoint} is not a checkpoint: latest(RUN) gives the newest of a run")
    return _load_tree(checkpoint / "params", _params_template(observation, config))


def load(checkpoint: Path, observation: Observation, config: Config) -> tuple[AgentState, Progress]:
    """All of a checkpoint, to go on training.

    Raises:
        UsageError: if the checkpoint was made for other shapes, or holds parameters only.
    """
    if not (checkpoint / "training").is_dir():
        raise UsageError(f"{checkpoint} holds parameters only: it can be evaluated, not resumed")
    template = jax.eval_shape(
        lambda key: init_state(key, observation, config=config), jax.random.key(0)
    )
    params = load_params(checkpoint, observation, config)
    training = _load_tree(checkpoint / "training", jax.eval_shape(_training_tree, template))
    state = AgentState(
        params=params,
        ema_params=training["ema_params"],
        optimizer=training["optimizer"],
        step=training["step"],
        key=jax.random.wrap_key_data(training["key"]),
    )
    return state, _load_progress(checkpoint / "progress.json")


def _load_progress(path: Path) -> Progress:
    try:
        data = json.loads(path.read_text())
        return Progress(
            episodes=int(data["episodes"]),
            env_steps=int(data["env_steps"]),
            learning_steps=int(data["learning_steps"]),
            seconds=float(data["seconds"]),
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"cannot read {path}: {error!r}") from error


def save_episode(run_dir: Path, number: int, episode: Episode) -> str:
    """Write one episode of the replay, complete or not at all.

    Returns: the file's checksum.
    """
    path = _episode_path(run_dir, number)
    path.parent.mkdir(exist_ok=True)
    arrays = {
        "actions": episode.actions,
        "rewards": episode.rewards,
        "flags": np.array([episode.terminated, episode.truncated]),
        "seed": np.array(episode.seed, np.int64),
        "image": episode.observations.image,
        "vector": episode.observations.vector,
    }
    return _write_arrays(path, arrays)


def save_batch(run_dir: Path, number: int, batch: Batch) -> Path:
    """Keep the batch of an update for inspection."""
    path = run_dir / "nonfinite" / f"{number:08d}.npz"
    path.parent.mkdir(exist_ok=True)
    arrays = {
        "image": batch.observations.image,
        "vector": batch.observations.vector,
        "actions": batch.actions,
        "rewards": batch.rewards,
        "terminals": batch.terminals,
    }
    _write_arrays(path, arrays)
    return path


def _write_arrays(path: Path, arrays: dict[str, np.ndarray | None]) -> str:
    """Write an .npz file without the arrays that are None, complete or not at all.

    Equal arrays give equal bytes: no date is written.
    """
    content = io.BytesIO()
    # Level 1: rendered frames shrink twelvefold at it, in 50 ms an episode.
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, array in arrays.items():
            if array is not None:
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, np.asarray(array), allow_pickle=False)
                member = zipfile.ZipInfo(f"{name}.npy")
                file.writestr(member, buffer.getbuffer(), zipfile.ZIP_DEFLATED, compresslevel=1)
    write_atomic(path, content.getbuffer())
    return hashlib.sha256(content.getbuffer()).hexdigest()


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read an .npz file, its headers checked against the sizes before anything is allocated."""
    arrays = {}
    with zipfile.ZipFile(path) as file:
        for info in file.infolist():
            with file.open(info) as member:
                version = np.lib.format.read_magic(member)
                read_header = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[version]
                shape, _, dtype = read_header(member)
                size = math.prod(shape) * dtype.itemsize
                if dtype.hasobject or member.tell() + size != info.file_size:
                    raise ValueError(f"{info.filename} is not the array that it says it is")
            with file.open(info) as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
            arrays[info.filename.removesuffix(".npy")] = array
    return arrays


def load_episode(run_dir: Path, number: int, example: Observation, config: Config) -> Episode:
    """Read one episode of the replay.

    Args:
        run_dir: directory of the run.
        number: of the episode.
        example: observation that the agent is built for.
        config: the run's configuration.

    Raises:
        UsageError: if it is missing, cannot be read, or is of another environment.
    """
    path = _episode_path(run_dir, number)
    try:
        arrays = _read_arrays(path)
        length = len(arrays["rewards"])
        frames = -(-length // config.frame_stride) + 1
        expected: dict[str, tuple[tuple[int, ...], Any]] = {
            "actions": ((length, config.model.action_dim), np.float32),
            "rewards": ((length,), np.float32),
            "flags": ((2,), np.bool_),
            "seed": ((), np.int64),
        }
        for name in ("image", "vector"):
            part = getattr(example, name)
            if part is not None:
                expected[name] = ((frames, *part.shape), part.dtype)
        given = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        if not length or given != expected:
            raise ValueError(f"it holds {given}, not {expected}")
        terminated, truncated = (bool(flag) for flag in arrays["flags"])
        return Episode(
            observations=Observation(image=arrays.get("image"), vector=arrays.get("vector")),
            actions=arrays["actions"],
            rewards=arrays["rewards"],
            terminated=terminated,
            truncated=truncated,
            seed=int(arrays["seed"]),
        )
    except _DAMAGED as error:
        raise UsageError(f"cannot read the episode {path}: {error!r}") from error


def prune_episodes(run_dir: Path, *, before: int) -> None:
    """Delete the episodes numbered below ``before``."""
    for path in (run_dir / "replay").glob("[0-9]" * 8 + ".npz"):
        if int(path.stem) < before:
            path.unlink()


def _episode_path(run_dir: Path, number: int) -> Path:
    return run_dir / "replay" / f"{number:08d}.npz"


def _training_tree(state: AgentState) -> dict[str, Any]:
    return {
        "ema_params": state.ema_params,
        "optimizer": state.optimizer,
        "step": state.step,
        "key": jax.random.key_data(state.key),
    }


def _save_tree(path: Path, tree: Any) -> None:
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path.absolute(), tree)
    except ValueError as error:  # which is what a full disk becomes on its way through Orbax
        reason = "No space left on device" if "RESOURCE_EXHAUSTED" in str(error) else str(error)
        raise OSError(f"{reason}: {path}") from error


def _load_tree(path: Path, template: Any) -> Any:
    """Restore after comparing the shapes on disk: Orbax by itself pads and truncates.

    Without a template, restore the nested dict that is there.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            stored = checkpointer.metadata(path.absolute()).item_metadata.tree
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UsageError(f"cannot read the checkpoint {path}: {error}") from error
        if template is None:
            template = stored
        else:
            expected = _shapes(ocp.tree.serialize_tree(template, keep_empty_nodes=True))
            _check_fit(_shapes(stored), expected, str(path))
        # To one device, whatever devices it was written from.
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        template = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), template
        )
        try:
            return checkpointer.restore(path.absolute(), template)
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"cannot read the checkpoint {path}: {error}") from error


def _check_fit(found: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    for name in sorted(found | expected):
        if found.get(name) != expected.get(name):
            raise UsageError(
                f"{where} does not fit this configuration: {name} is "
                f"{found.get(name, 'absent')} there, {expected.get(name, 'absent')} here"
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }


def export(run: Path, directory: Path, *, half: bool = False) -> None:
    """Write the agent of a run, or of one of its checkpoints, as files of its own (see `agents`).

    Raises:
        UsageError: if there is no such agent, or the directory exists or cannot be written.
    """
    run_dir, found = locate(run)
    config, found = load_config(run_dir), found or latest(run_dir)
    params = read_params(found)  # verifies all that is read below
    progress = _load_progress(found / "progress.json")
    trained = {
        "episodes": progress.episodes,
        "environment_steps": progress.env_steps,
        "updates": read_signed(found / MANIFEST)["updates"],
        "hours": round(progress.seconds / 3600, 2),
    }
    agents.save(directory, params, config, half=half, trained=trained)
