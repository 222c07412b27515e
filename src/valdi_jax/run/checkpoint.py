"""Checkpoints: written atomically, verified, recovered and loaded (their files: `run.rundir`)."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import secrets
import shutil
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from valdi_jax.config import Config
from valdi_jax.data.collector import Round
from valdi_jax.data.source import Progress
from valdi_jax.errors import UsageError
from valdi_jax.model import params_shapes
from valdi_jax.observation import Observation
from valdi_jax.run import npz, rundir
from valdi_jax.run.manifest import (
    MANIFEST,
    content_digest,
    describe_files,
    file_digest,
    find_damage,
    flush,
    read_signed,
    write_json,
    write_signed,
)
from valdi_jax.types import AgentState, Params
from valdi_jax.updates import state_shapes

_UNFINISHED = ("partial", "replaced", "deleted")  # prefixes of checkpoints to ignore


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
        write_signed(run_dir / rundir.IDENTITY, body)
        if state is not None:
            save(run_dir, state, Progress(), keep=1, replay={})
        rundir.save_config(run_dir, config)
    except OSError as error:
        raise UsageError(f"cannot write to {run_dir}: {error.strerror or error}") from error


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
    for old in rundir.checkpoints(run_dir)[:-keep]:
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
        if not damage and load_progress(checkpoint / "progress.json").episodes != int(
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
        path = npz.episode_path(run_dir, number)
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
    known = rundir.identity(run_dir)
    found = rundir.checkpoints(run_dir)
    foreign = [p for p in found if known and rundir.run_of(p) not in (None, known["id"])]
    if foreign and len(foreign) == len(found):
        raise UsageError(f"{run_dir} has no checkpoint of its own: all belong to another run")
    for path in foreign:
        rundir.set_aside(path, "foreign")
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
        rundir.set_aside(npz.episode_path(run_dir, number))
    for path in found:
        if damage[path] or path > used:
            rundir.set_aside(path)
    if sentences:
        sentences.append(f"going on from {used}")
    if lost[used]:
        sentences.append(f"going on without {len(lost[used])} damaged episodes")
    replay = replay_digests(used)
    kept = {n: digest for n, digest in replay.items() if n not in lost[used]}
    return Recovered(used, kept, sentences)


def _run_id(run_dir: Path) -> str | None:
    try:
        return (rundir.identity(run_dir) or {}).get("id")
    except UsageError:  # damaged since the run began: no reason not to save
        return None


def read_params(checkpoint: Path) -> Params:
    """The parameters to act with of a checkpoint, verified but without a check of their shapes.

    Raises:
        UsageError: if it is damaged.
    """
    run_dir, _ = rundir.locate(checkpoint)
    for sentence in verify(checkpoint):
        raise UsageError(f"{sentence}: see python -m valdi_jax.checkpoint {run_dir}")
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
    return state, load_progress(checkpoint / "progress.json")


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


def load_progress(path: Path) -> Progress:
    """The counters of a checkpoint's ``progress.json``.

    Raises:
        UsageError: if it cannot be read.
    """
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
            expected = shapes(ocp.tree.serialize_tree(template, keep_empty_nodes=True))
            check_fit(shapes(stored), expected, str(path))
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


def check_fit(found: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    """Compare `shapes`, of what is ``where`` and of what a configuration needs.

    Raises:
        UsageError: naming the first array that differs.
    """
    for name in sorted(found | expected):
        if found.get(name) != expected.get(name):
            raise UsageError(
                f"{where} does not fit this configuration: {name} is "
                f"{found.get(name, 'absent')} there, {expected.get(name, 'absent')} here"
            )


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of a tree's arrays, by their path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }
