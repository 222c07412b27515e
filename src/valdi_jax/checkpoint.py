"""The run directory: configuration, checkpoints and the replay's episodes.

    RUN/config.json               the resolved configuration
    RUN/checkpoints/00000025/     after 25 episodes:
        params/                     the online networks, all that driving needs (Orbax)
        training/                   EMA, optimizer, step and key (Orbax)
        progress.json               counters
    RUN/replay/00000024.npz       one episode, written once
    RUN/nonfinite/00000731.npz    the batch of an update whose loss was not finite
    RUN/metrics.jsonl             one line an episode
    RUN/evaluations.jsonl         one line an evaluation
    RUN/events.out.tfevents.*     TensorBoard

Everything random follows from the seed and the counters, so there is no other state to keep.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from valdi_jax.config import Config, from_dict, to_dict
from valdi_jax.errors import UsageError
from valdi_jax.model import init_params
from valdi_jax.replay import Episode
from valdi_jax.types import AgentState, Batch, Observation, Params
from valdi_jax.update import init_state

_UNFINISHED = ("partial", "replaced")  # prefixes of checkpoints that do not count

# What reading a damaged .npz file raises, depending on where the damage is.
_DAMAGED = (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(frozen=True)
class Progress:
    """Counters of a run."""

    episodes: int = 0  # collected
    env_steps: int = 0  # collected
    learning_steps: int = 0  # of these, collected after the seed episodes
    seconds: float = 0.0  # spent training


def create_run(run_dir: Path, config: Config) -> None:
    """Make a run directory that holds the configuration.

    Raises:
        UsageError: if the directory cannot be written, or already holds a run.
    """
    try:
        if (run_dir / "config.json").exists():
            raise UsageError(f"{run_dir} already holds a run: continue it with --resume {run_dir}")
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(run_dir, config)
    except OSError as error:
        raise UsageError(f"cannot write to {run_dir}: {error.strerror}") from error


def save_config(run_dir: Path, config: Config) -> None:
    """Write the configuration of a run."""
    write_json(run_dir / "config.json", to_dict(config))


def load_config(run_dir: Path) -> Config:
    """The configuration of a run.

    Raises:
        UsageError: if this is not a run directory, or its configuration is not valid.
    """
    path = run_dir / "config.json"
    try:
        if not path.is_file():
            raise UsageError(f"{run_dir} is not a run directory: it has no config.json")
        data = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} is not a valid configuration: {error}") from error
    try:
        return from_dict(data)
    except UsageError as error:
        raise UsageError(f"{path} is not a valid configuration: {error}") from error


def save(run_dir: Path, state: AgentState, progress: Progress, *, keep: int) -> Path:
    """Write a checkpoint, complete or not at all, and delete the oldest beyond ``keep``.

    Returns: the checkpoint's directory.
    """
    final = run_dir / "checkpoints" / f"{progress.episodes:08d}"
    partial, replaced = (final.with_name(f"{kind}-{final.name}") for kind in _UNFINISHED)
    for kind in _UNFINISHED:  # what an earlier kill may have left
        for leftover in final.parent.glob(f"{kind}-*"):
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    _save_tree(partial / "params", state.params)
    _save_tree(partial / "training", _training_tree(state))
    write_json(partial / "progress.json", dataclasses.asdict(progress))
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    for old in [replaced, *checkpoints(run_dir)[:-keep]]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def save_params(run_dir: Path, params: Params) -> Path:
    """Write a checkpoint that can be driven with but not trained on."""
    final = run_dir / "checkpoints" / "00000000"
    _save_tree(final / "params", params)
    write_json(final / "progress.json", dataclasses.asdict(Progress()))
    return final


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("[0-9]" * 8))


def latest(run_dir: Path) -> Path:
    """The newest checkpoint of a run.

    Raises:
        UsageError: if there is none.
    """
    found = checkpoints(run_dir)
    if not found:
        raise UsageError(f"{run_dir} holds no checkpoint yet")
    return found[-1]


def load_params(checkpoint: Path, observation: Observation, config: Config) -> Params:
    """The online networks of a checkpoint.

    Args:
        checkpoint: its directory.
        observation: example that the encoder is built for.
        config: the run's configuration.

    Raises:
        UsageError: if the checkpoint was made for other shapes.
    """
    template = jax.eval_shape(
        lambda key: init_params(key, observation, config=config), jax.random.key(0)
    )
    return _load_tree(checkpoint / "params", template)


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
    training = _load_tree(
        checkpoint / "training", jax.eval_shape(lambda state: _training_tree(state), template)
    )
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


def save_episode(run_dir: Path, number: int, episode: Episode) -> None:
    """Write one episode of the replay, complete or not at all."""
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
    _write_arrays(path, arrays)


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


def _write_arrays(path: Path, arrays: dict[str, np.ndarray | None]) -> None:
    """Write an .npz file without the arrays that are None, complete or not at all."""
    partial = path.with_suffix(".partial")
    # Level 1: rendered frames shrink twelvefold at it, in 50 ms an episode.
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, array in arrays.items():
            if array is not None:
                with file.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    partial.replace(path)


def load_episode(run_dir: Path, number: int) -> Episode:
    """Read one episode of the replay.

    Raises:
        UsageError: if it is missing or cannot be read.
    """
    path = _episode_path(run_dir, number)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
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
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree)


def _load_tree(path: Path, template: Any) -> Any:
    """Restore after comparing the shapes on disk: Orbax by itself pads and truncates."""
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            stored = checkpointer.metadata(path.absolute()).item_metadata.tree
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UsageError(f"cannot read the checkpoint {path}: {error}") from error
        found = _shapes(stored)
        expected = _shapes(ocp.tree.serialize_tree(template, keep_empty_nodes=True))
        for name in sorted(found | expected):
            if found.get(name) != expected.get(name):
                raise UsageError(
                    f"{path} does not fit this configuration: {name} is "
                    f"{found.get(name, 'absent')} there, {expected.get(name, 'absent')} here"
                )
        try:
            return checkpointer.restore(path.absolute(), template)
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"cannot read the checkpoint {path}: {error}") from error


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file, complete or not at all."""
    partial = path.with_suffix(".partial")
    with open(partial, "w") as file:
        file.write(json.dumps(data, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
