"""The run directory: configuration, checkpoints and the replay's episodes.

    RUN/config.json               the resolved configuration
    RUN/run.json                  the run's identity, and the checksum of its configuration
    RUN/checkpoints/00000025/     after 25 episodes:
        params/                     the parameters to act with (Orbax)
        training/                   EMA, optimizer, step and key (Orbax); the online networks, if
                                    it acts with their average
        rounds/, rounds.json        parameters of rounds under way, with a lag (Orbax)
        progress.json               counters
        manifest.json               checksums of these files and of the replay's
    RUN/replay/00000024.npz       one episode, written once
    RUN/nonfinite/00000731.npz    the batch of an update whose loss was not finite
    RUN/metrics.jsonl             one line per episode
    RUN/evaluations.jsonl         one line per evaluation
    RUN/events.out.tfevents.*     TensorBoard; in env_steps/, over environment steps
    RUN/videos/00000050.gif       the first fixed episode, if eval.video asks for it
    RUN/lock                      held by the process that trains

All randomness derives from the seed and the counters, so there is no other state to save. Damaged
files are renamed with the prefix ``damaged-``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import secrets
import shutil
import types
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from valdi_jax.config import Config, added_since, from_dict, to_dict
from valdi_jax.data.collector import Round
from valdi_jax.data.episode import Episode
from valdi_jax.data.source import Progress
from valdi_jax.errors import StoppedError, UsageError
from valdi_jax.model import params_shapes
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
from valdi_jax.updates import state_shapes

_UNFINISHED = ("partial", "replaced", "deleted")  # prefixes of checkpoints to ignore

_IDENTITY = "run.json"
_LARGEST_CONFIG = 1_000_000  # bytes
_READS = 5  # attempts to read an agent of a run in progress

# Exceptions that reading a damaged .npz file can raise.
_DAMAGED = (
    *(OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, SyntaxError),
    *(RuntimeError, OverflowError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
)


def create_run(
    run_dir: Path,
    config: Config,
    state: AgentState | None = None,
    *,
    made_by: str | None = None,
    data: str | None = None,
) -> None:
    """Make a run of a directory that this process holds (see `lock`).

    A run that does not start from the agent that its configuration determines needs its ``state``.
    That checkpoint is written first: without it the directory does not count as a run. ``made_by``
    names a custom factory of the environments, ``data`` is a checksum of recorded episodes.

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
        body: dict[str, Any] = {"id": secrets.token_hex(16), "made_by": made_by, "data": data}
        body["config_sha256"] = []
        write_signed(run_dir / _IDENTITY, body)
        if state is not None:
            save(run_dir, state, Progress(), keep=1, replay={})
        save_config(run_dir, config)
    except OSError as error:
        raise UsageError(f"cannot write to {run_dir}: {error.strerror or error}") from error


def save_config(run_dir: Path, config: Config) -> None:
    """Write the configuration of a run, and its checksum."""
    content = json.dumps(to_dict(config), indent=2).encode() + b"\n"
    accept_config(run_dir, hashlib.sha256(content).hexdigest(), keep=True)
    write_atomic(run_dir / "config.json", content)
    accept_config(run_dir, hashlib.sha256(content).hexdigest())


def accept_config(run_dir: Path, digest: str | None = None, *, keep: bool = False) -> None:
    """Record the checksum of the run's configuration.

    Args:
        run_dir: directory of the run.
        digest: checksum of the configuration, by default of the file.
        keep: also accept the previous checksum, in case of a kill before the file is replaced.
    """
    path = run_dir / "config.json"
    body = identity(run_dir)
    if body is None:  # an older run: its checkpoints stay its own
        own = [run for run in map(_run_of, checkpoints(run_dir)) if run is not None]
        body = {"id": own[-1] if own else secrets.token_hex(16), "made_by": None}
        body["config_sha256"] = [file_digest(path)] if path.exists() else []
    accepted = [digest or file_digest(path)]
    if keep:
        accepted += body["config_sha256"]
    write_signed(run_dir / _IDENTITY, {**body, "config_sha256": accepted})


def identity(run_dir: Path) -> dict[str, Any] | None:
    """The run's identity; None for a run older than this feature.

    Raises:
        UsageError: if it is damaged.
    """
    path = Path(run_dir) / _IDENTITY
    if not path.exists():
        return None
    try:
        body = read_signed(path)
        return {
            "id": body["id"],
            "made_by": body["made_by"],
            "data": body.get("data"),
            "config_sha256": body["config_sha256"],
        }
    except (ValueError, KeyError) as error:
        raise UsageError(
            f"{path} is damaged ({error}): delete it, and resuming makes a new one"
        ) from error


def load_config(run_dir: Path) -> Config:
    """The configuration of a run.

    Raises:
        UsageError: if this is not a run directory, or its configuration is not valid or differs
            from its checksum.
    """
    path = Path(run_dir) / "config.json"
    try:
        if not path.is_file():
            raise UsageError(f"{run_dir} is not a run directory: it has no config.json")
        if (Path(run_dir) / agents.TENSORS).exists():
            raise UsageError(f"{run_dir} is an agent, not a run: start one with --init-from")
        if path.stat().st_size > _LARGEST_CONFIG:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        content = path.read_bytes()
        data = json.loads(content)
    except (ValueError, OSError, RecursionError) as error:
        reason = str(error)[:200]
        raise UsageError(f"{path} is not a valid configuration: {reason}") from error
    try:
        config = from_dict(data)
    except UsageError as error:
        raise UsageError(f"{path} is not a valid configuration: {error}") from error
    known = identity(run_dir)
    if known and hashlib.sha256(content).hexdigest() not in known["config_sha256"]:
        raise UsageError(
            f"{path} differs from its checksum; if it was changed on purpose, python -m "
            f"valdi_jax.checkpoint {run_dir} --accept-config renews that"
        )
    return config


def options_since(run_dir: Path) -> list[str]:
    """Options added since a run began, which have their defaults there."""
    return added_since(json.loads((run_dir / "config.json").read_text()))


def save(
    run_dir: Path,
    state: AgentState,
    progress: Progress,
    *,
    keep: int,
    replay: dict[int, str],
    under_way: Sequence[Round] = (),
) -> Path:
    """Write a checkpoint atomically, and delete the oldest beyond ``keep``.

    ``replay`` holds the checksums of the replay buffer's episodes, from `save_episode`;
    ``under_way`` are rounds begun with parameters that the state may no longer have.

    Returns: the checkpoint's directory.

    Raises:
        OSError: if it cannot be written; earlier checkpoints stay.
    """
    final = run_dir / "checkpoints" / f"{progress.episodes:08d}"
    partial, replaced, _ = (final.with_name(f"{kind}-{final.name}") for kind in _UNFINISHED)
    for kind in _UNFINISHED:  # left by an earlier kill
        for leftover in final.parent.glob(f"{kind}-*"):
            shutil.rmtree(leftover, ignore_errors=kind != "partial")
    partial.mkdir(parents=True)
    training = _training_tree(state)
    counters = dataclasses.replace(progress, seconds=0.0)  # time is not part of the content
    content = [state.acting, training, dataclasses.asdict(counters), sorted(replay.items())]
    try:
        _check_space(partial, (state, [each.params for each in under_way]))
        _save_tree(partial / "params", state.acting)
        _save_tree(partial / "training", training)
        if under_way:
            content.append(_save_rounds(partial, under_way))
        write_json(partial / "progress.json", dataclasses.asdict(progress))
        run = _run_id(run_dir)
        _write_manifest(partial, run, updates=int(state.step), replay=replay, content=content)
        flush(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # frees the space on a full disk
        raise
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    flush(final.parent, recursive=False)
    shutil.rmtree(replaced, ignore_errors=True)
    for old in checkpoints(run_dir)[:-keep]:
        # Renamed first, so that readers find all of it or nothing.
        shutil.rmtree(old.rename(old.with_name(f"deleted-{old.name}")), ignore_errors=True)
    return final


def save_params(run_dir: Path, params: Params) -> Path:
    """Write a checkpoint that can be evaluated but not resumed."""
    final = run_dir / "checkpoints" / "00000000"
    _save_tree(final / "params", params)
    write_json(final / "progress.json", dataclasses.asdict(Progress()))
    run = _run_id(run_dir)
    _write_manifest(final, run, updates=0, replay={}, content=params)
    return final


def _write_manifest(
    directory: Path, run: str | None, *, updates: int, replay: dict[int, str], content: Any
) -> None:
    body = {
        "run": run,
        "updates": updates,
        "content": content_digest(jax.tree.map(_hashable, content)),
        "files": describe_files(directory),
        "replay": {str(number): digest for number, digest in sorted(replay.items())},
    }
    write_signed(directory / MANIFEST, body)


def _hashable(leaf: Any) -> Any:
    return np.frombuffer(leaf.encode(), np.uint8) if isinstance(leaf, str) else leaf


def verify(checkpoint: Path) -> list[str]:
    """Defects of a checkpoint's own files, a sentence each; empty if it is intact."""
    try:
        replay_digests(checkpoint)
        damage = find_damage(checkpoint, read_signed(checkpoint / MANIFEST)["files"])
        if not damage and _load_progress(checkpoint / "progress.json").episodes != int(
            checkpoint.name
        ):
            damage = [f"{checkpoint} is of another number of episodes than its name says"]
        return damage
    except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
        return [str(error)]


def verify_replay(run_dir: Path, checkpoint: Path) -> dict[int, str]:
    """Defects of a checkpoint's replay episodes, by their numbers."""
    problems = {}
    for number, digest in replay_digests(checkpoint).items():
        path = _episode_path(run_dir, number)
        if not path.is_file():
            problems[number] = f"{path} is missing"
        elif file_digest(path) != digest:
            problems[number] = f"{path} differs from its checksum"
    return problems


def replay_digests(checkpoint: Path) -> dict[int, str]:
    """Checksums of an intact checkpoint's replay episodes, oldest first."""
    replay = read_signed(checkpoint / MANIFEST)["replay"]  # JSON keys are text, and sorted as text
    return dict(sorted((int(number), digest) for number, digest in replay.items()))


class Recovered(NamedTuple):
    """What a run resumes from."""

    checkpoint: Path | None = None  # None if the run has none
    digests: Mapping[int, str] = types.MappingProxyType({})  # of the intact episodes
    sentences: Sequence[str] = ()  # on what is damaged


def recover(run_dir: Path) -> Recovered:
    """The newest intact checkpoint, preferably one whose replay episodes are intact too.

    Damaged files, and checkpoints newer than the one used, are set aside.

    Raises:
        UsageError: if there are checkpoints, but none is intact.
    """
    for replaced in (run_dir / "checkpoints").glob("replaced-" + "[0-9]" * 8):
        final = replaced.with_name(replaced.name.removeprefix("replaced-"))
        if not final.exists():  # killed between the two renames of `save`
            replaced.rename(final)
    sentences = []
    known = identity(run_dir)
    found = checkpoints(run_dir)
    foreign = [p for p in found if known and _run_of(p) not in (None, known["id"])]
    if foreign and len(foreign) == len(found):
        raise UsageError(f"{run_dir} has no checkpoint of its own: all belong to another run")
    for path in foreign:
        _set_aside(path, "foreign")
        sentences.append(f"{path} belongs to another run, and is set aside")
    found = [path for path in found if path not in foreign]
    damage = {path: verify(path) for path in found}
    whole = [path for path in found if not damage[path]]
    lost = {path: verify_replay(run_dir, path) for path in whole}
    sentences += [sentence for path in found for sentence in damage[path]]
    if not whole:
        if found:
            raise UsageError(f"no checkpoint of {run_dir} is whole: {sentences[-1]}")
        return Recovered(sentences=sentences)
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


def _run_of(checkpoint: Path) -> str | None:
    """The id of the run that a checkpoint belongs to, as far as it is known and readable."""
    try:
        return read_signed(checkpoint / MANIFEST).get("run")
    except ValueError:
        return None


def _run_id(run_dir: Path) -> str | None:
    try:
        return (identity(run_dir) or {}).get("id")
    except UsageError:  # damaged since the run began: no reason not to save
        return None


def _set_aside(path: Path, why: str = "damaged") -> None:
    aside = path.with_name(f"{why}-{path.name}")
    if aside.is_dir():
        shutil.rmtree(aside)
    if path.exists():
        path.replace(aside)


class Lock:
    """A run directory that this process holds.

    Attributes:
        warning: a message to report, if any.
    """

    def __init__(self, run_dir: Path, file: IO[str], warning: str = ""):
        self._path, self._file, self.warning = run_dir / "lock", file, warning

    def check(self) -> None:
        """Raise StoppedError if the directory is no longer where it was."""
        try:
            here = self._path.stat().st_ino == os.fstat(self._file.fileno()).st_ino
        except OSError:
            here = False
        if not here:
            raise StoppedError(f"{self._path.parent} was moved or deleted while the run went on")


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[Lock]:
    """Lock a run directory, made if missing; the system unlocks it however the process ends.

    Raises:
        UsageError: if another process holds it, it cannot be written, its name would be misread, or
            it contains links that lead elsewhere.
    """
    if str(run_dir) in ("", "."):
        raise UsageError("the run directory is empty or the current one: give it a name")
    if any(character in str(run_dir.absolute()) for character in "[]*?"):
        raise UsageError(f"{run_dir.absolute()}: checkpoints need a path without any of []*?")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for path in run_dir.rglob("*"):
            if path.is_symlink():
                raise UsageError(f"{path} is a symbolic link, which would be written through")
        file = open(run_dir / "lock", "a+")
    except OSError as error:
        raise UsageError(f"cannot write to {run_dir}: {error.strerror or error}") from error
    with file:
        held = Lock(run_dir, file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UsageError(
                f"{run_dir} is in use by the process {file.read().strip() or 'that locked it'}"
            ) from None
        except OSError as error:  # some cluster file systems have no locks
            held.warning = f"{run_dir} cannot be locked ({error.strerror}): start one process alone"
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield held


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
    """The run directory of a path, and the checkpoint if the path is one."""
    if path.parent.name == "checkpoints" and path.is_dir():
        return path.parent.parent, path
    return path, None


@dataclasses.dataclass
class StoredAgent:
    """A trained agent on disk.

    Attributes:
        name: where it is; after `load`, the checkpoint that was read.
        config: the configuration that it was trained with.
        made_by: name of the custom factory of its environments, if any.
    """

    name: str
    config: Config
    read: Callable[[], tuple[Params, str]]
    made_by: str | None = None

    def load(
        self,
        observation: Observation | None = None,
        *,
        config: Config | None = None,
        fresh: Params | None = None,
    ) -> Params:
        """Load its parameters onto the device.

        Given an example ``observation``, check that all shapes fit ``config``, by default its own.
        Additional networks that it lacks are taken from ``fresh``, if given.

        Raises:
            UsageError: if it is damaged, or naming the first parameter that does not fit.
        """
        read, self.name = self.read()
        params = jax.tree.map(jnp.asarray, read)
        if fresh is not None:
            networks = (config or self.config).model.networks
            params = {name: fresh[name] for name in networks if name in fresh} | params
            if "statistics" in fresh:
                params["statistics"] = fresh["statistics"] | params.get("statistics", {})
        if observation is not None:
            template = params_shapes(observation, config=config or self.config)
            _check_fit(_shapes(params), _shapes(template), self.name)
        return params


def open_agent(where: Path | str) -> StoredAgent:
    """Find an agent: a run (its newest checkpoint), a checkpoint, an exported or a bundled agent.

    Raises:
        UsageError: if it is none of these, or a damaged exported agent.
    """
    where = Path(where)
    exported = agents.locate(where)
    if exported is not None:
        config, params, trained = agents.load(exported)
        name = str(where)
        return StoredAgent(name, config, lambda: (params, name), trained.get("made_by"))
    run_dir, found = locate(where)
    if not run_dir.exists():
        raise UsageError(
            f"{where} is not a run directory, nor an agent that comes with the package "
            f"({', '.join(agents.packaged())})"
        )
    config = load_config(run_dir)
    made_by = (identity(run_dir) or {}).get("made_by")
    first = found or latest(run_dir)

    def read() -> tuple[Params, str]:
        chosen = first
        for _ in range(_READS):
            try:
                return read_params(chosen), str(chosen)
            except (UsageError, OSError):
                if found or chosen.exists():  # else the run has replaced it
                    raise
            chosen = latest(run_dir)
        raise UsageError(f"{run_dir} replaces its checkpoints faster than they can be read")

    return StoredAgent(str(first), config, read, made_by)


def read_params(checkpoint: Path) -> Params:
    """The parameters to act with of a checkpoint, verified but without a check of their shapes.

    Raises:
        UsageError: if it is damaged.
    """
    for sentence in verify(checkpoint):
        raise UsageError(f"{sentence}: see python -m valdi_jax.checkpoint {locate(checkpoint)[0]}")
    return _load_tree(checkpoint / "params", None)


def load_params(checkpoint: Path, observation: Observation, config: Config) -> Params:
    """The parameters to act with of a checkpoint directory; ``observation`` is one example.

    Raises:
        UsageError: if this is not a checkpoint, or its shapes differ.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / "params").is_dir():
        raise UsageError(f"{checkpoint} is not a checkpoint: latest(RUN) gives the newest of a run")
    return _load_tree(checkpoint / "params", params_shapes(observation, config=config))


def load(checkpoint: Path, observation: Observation, config: Config) -> tuple[AgentState, Progress]:
    """A whole checkpoint, to resume training.

    An average begins at the parameters, if the run began without one.

    Raises:
        UsageError: if its shapes differ, or it holds parameters only.
    """
    if not (checkpoint / "training").is_dir():
        raise UsageError(f"{checkpoint} holds parameters only: it can be evaluated, not resumed")
    with _checkpointer() as checkpointer:
        averaged = "params" in _stored(checkpointer, checkpoint / "training")
    begun_with = config.replace(learn={"average": float(averaged)})
    template = state_shapes(observation, config=begun_with)
    acting = load_params(checkpoint, observation, config)
    training = _load_tree(checkpoint / "training", jax.eval_shape(_training_tree, template))
    state = AgentState(
        params=training.get("params", acting),
        ema_params=training["ema_params"],
        optimizer=training["optimizer"],
        step=training["step"],
        key=jax.random.wrap_key_data(training["key"]),
        average=jax.tree.map(jnp.copy, acting) if config.acts_with_average else None,
        after=training.get("after"),
    )
    return state, _load_progress(checkpoint / "progress.json")


def _save_rounds(directory: Path, rounds: Sequence[Round]) -> Any:
    """Write rounds under way, those with the same parameters together; returns what they hold."""
    versions = {id(each.params): each.params for each in rounds}
    place = {identity: str(i) for i, identity in enumerate(versions)}
    trees = {place[identity]: params for identity, params in versions.items()}
    entries = [
        [each.numbers.start, each.numbers.stop, each.version, place[id(each.params)]]
        for each in rounds
    ]
    _save_tree(directory / "rounds", trees)
    write_json(directory / "rounds.json", entries)
    return trees, entries


def load_rounds(checkpoint: Path, observation: Observation, config: Config) -> list[Round]:
    """The rounds that were under way when a checkpoint was written.

    Raises:
        UsageError: if their shapes differ.
    """
    path = Path(checkpoint) / "rounds.json"
    if not path.exists():
        return []
    try:
        entries = [
            (range(int(start), int(stop)), int(version), str(place))
            for start, stop, version, place in json.loads(path.read_text())
        ]
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"cannot read {path}: {error!r}") from error
    template = params_shapes(observation, config=config)
    trees = _load_tree(checkpoint / "rounds", {place: template for *_, place in entries})
    return [Round(numbers, version, trees[place]) for numbers, version, place in entries]


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
    """Write one episode of the replay buffer atomically; returns the file's checksum."""
    path = _episode_path(run_dir, number)
    path.parent.mkdir(exist_ok=True)
    return _write_arrays(path, _episode_arrays(episode))


def pack_episode(episode: Episode) -> bytes:
    """The content of an episode's file."""
    return _pack(_episode_arrays(episode))


def _episode_arrays(episode: Episode) -> dict[str, np.ndarray | None]:
    return {
        "actions": episode.actions,
        "rewards": episode.rewards,
        "flags": np.array([episode.terminated, episode.truncated]),
        "seed": np.array(episode.seed, np.int64),
        "image": episode.observations.image,
        "vector": episode.observations.vector,
    }


def save_batch(run_dir: Path, number: int, batch: Batch) -> Path:
    """Save the batch of an update for inspection."""
    path = run_dir / "nonfinite" / f"{number:08d}.npz"
    path.parent.mkdir(exist_ok=True)
    arrays = {
        "image": batch.observations.image,
        "vector": batch.observations.vector,
        "actions": batch.actions,
        "rewards": batch.rewards,
        "terminals": batch.terminals,
        "within": batch.within,
    }
    _write_arrays(path, arrays)
    return path


def _write_arrays(path: Path, arrays: dict[str, np.ndarray | None]) -> str:
    """Write an .npz file atomically; returns its checksum."""
    content = _pack(arrays)
    write_atomic(path, content)
    return hashlib.sha256(content).hexdigest()


def _pack(arrays: dict[str, np.ndarray | None]) -> bytes:
    """The arrays that are not None as an .npz file.

    Equal arrays give equal bytes, because no date is written.
    """
    content = io.BytesIO()
    # Level 1 shrinks rendered frames twelvefold, in 50 ms per episode.
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, array in arrays.items():
            if array is not None:
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, np.asarray(array), allow_pickle=False)
                member = zipfile.ZipInfo(f"{name}.npy")
                file.writestr(member, buffer.getbuffer(), zipfile.ZIP_DEFLATED, compresslevel=1)
    return content.getvalue()


def _unpack(
    packed: Path | IO[bytes], check: Callable[[dict[str, Any]], None]
) -> dict[str, np.ndarray]:
    """Read an .npz file, after ``check`` of all headers: (shape, dtype) of every array by name.

    Nothing is allocated before. ``check`` raises ValueError if they are wrong.
    """
    headers, arrays = {}, {}
    with zipfile.ZipFile(packed) as file:
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
            headers[info.filename.removesuffix(".npy")] = (shape, dtype)
        check(headers)
        for info in file.infolist():
            with file.open(info) as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
            arrays[info.filename.removesuffix(".npy")] = array
    return arrays


def load_episode(run_dir: Path, number: int, example: Observation, config: Config) -> Episode:
    """Read one episode of the replay buffer; ``example`` is an observation of the agent.

    Raises:
        UsageError: if it is missing, cannot be read, or is of another environment.
    """
    path = _episode_path(run_dir, number)
    try:
        return _read_episode(path, example, config)
    except _DAMAGED as error:
        raise UsageError(f"cannot read the episode {path}: {error!r}") from error


def unpack_episode(content: bytes, example: Observation, config: Config) -> Episode:
    """`load_episode` from the content of its file."""
    return _read_episode(io.BytesIO(content), example, config)


def _read_episode(packed: Path | IO[bytes], example: Observation, config: Config) -> Episode:
    """Raises one of _DAMAGED."""

    def check(given: dict[str, Any]) -> None:
        length = given["rewards"][0][0]
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
        if not length or given != expected:
            raise ValueError(f"it holds {given}, not {expected}"[:1000])

    arrays = _unpack(packed, check)
    terminated, truncated = (bool(flag) for flag in arrays["flags"])
    return Episode(
        observations=Observation(image=arrays.get("image"), vector=arrays.get("vector")),
        actions=arrays["actions"],
        rewards=arrays["rewards"],
        terminated=terminated,
        truncated=truncated,
        seed=int(arrays["seed"]),
    )


def prune_episodes(run_dir: Path, *, before: int) -> None:
    """Delete the episodes numbered below ``before``."""
    for path in (run_dir / "replay").glob("[0-9]" * 8 + ".npz"):
        if int(path.stem) < before:
            path.unlink()


def _episode_path(run_dir: Path, number: int) -> Path:
    return run_dir / "replay" / f"{number:08d}.npz"


def _training_tree(state: AgentState) -> dict[str, Any]:
    tree = {
        "ema_params": state.ema_params,
        "optimizer": state.optimizer,
        "step": state.step,
        "key": jax.random.key_data(state.key),
    }
    if state.after is not None:
        tree["after"] = state.after
    return tree if state.average is None else tree | {"params": state.params}


def _check_space(directory: Path, state: Any) -> None:
    """Raise OSError where there is no room, because Orbax fails with pages of tracebacks."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    if shutil.disk_usage(directory).free < 2 * size + 2**20:  # Orbax may write a file twice
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


def _checkpointer() -> ocp.StandardCheckpointer:
    """Orbax in this process alone: by default it waits for all to write or read together."""
    if jax.process_count() == 1:
        return ocp.StandardCheckpointer()
    rank = jax.process_index()
    return ocp.StandardCheckpointer(
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=rank, active_processes={rank}, barrier_sync_key_prefix=f"process_{rank}"
        )
    )


def _save_tree(path: Path, tree: Any) -> None:
    if jax.process_count() > 1:  # of several, Orbax takes no arrays of one
        tree = jax.device_get(tree)
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(path.absolute(), tree)
    except ValueError as error:  # Orbax raises this for a full disk
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OSError(f"No space left on device: {path}") from error


def _load_tree(path: Path, template: Any) -> Any:
    """Restore after comparing the shapes on disk, because Orbax pads and truncates.

    Without a template, restore the stored nested dict.
    """
    with _checkpointer() as checkpointer:
        stored = _stored(checkpointer, path)
        if template is None:
            template = stored
        else:
            expected = _shapes(ocp.tree.serialize_tree(template, keep_empty_nodes=True))
            _check_fit(_shapes(stored), expected, str(path))
        # To one device, independent of those that it was written from.
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        template = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), template
        )
        try:
            return checkpointer.restore(path.absolute(), template)
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"cannot read the checkpoint {path}: {error}") from error


def _stored(checkpointer: ocp.StandardCheckpointer, path: Path) -> Any:
    """Shapes of the tree on disk."""
    try:
        return checkpointer.metadata(path.absolute()).item_metadata.tree
    except (OSError, ValueError, KeyError, AttributeError) as error:
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
    """Export the agent of a run, or of one of its checkpoints (see `agents`).

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
    made_by = (identity(run_dir) or {}).get("made_by")
    if made_by:
        trained["made_by"] = made_by
    agents.save(directory, params, config, half=half, trained=trained)
