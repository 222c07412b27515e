"""Recorded episodes, from Minari datasets or from Python."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from valdi_jax.config import Config
from valdi_jax.data.episode import Episode
from valdi_jax.envs.spaces import Interface
from valdi_jax.errors import UsageError
from valdi_jax.registry import Registry

GIVEN = "python"  # what collect.data says where a program gives the episodes
ENVIRONMENT = "valdi_env"  # where a dataset that this package records keeps its environment's name


def read_recorded(name: str, interface: Interface, config: Config) -> list[Episode]:
    """The episodes of ``--data KIND:ID``.

    Raises:
        UsageError: if there are none such, or they do not fit the environment's spaces.
    """
    if name == GIVEN:
        raise UsageError(
            "the recorded data of this run came from a program: continue it from there, with "
            "train(..., data=...)"
        )
    kind, _, rest = name.partition(":")
    return to_episodes(READERS[kind](rest), interface, config, name)


def environment_of(name: str) -> str | None:
    """The environment of ``--data KIND:ID``, as ``--env`` takes it; None if it names none.

    Its name alone: other options of the environment are the preset's.

    Raises:
        UsageError: if there is no such data.
    """
    kind, _, rest = name.partition(":")
    if kind != "minari":
        return None
    data = _minari(rest)
    if ENVIRONMENT in data.storage.metadata:
        return str(data.storage.metadata[ENVIRONMENT])
    return data.env_spec and f"gym:{data.env_spec.id}"


def _read_minari(name: str) -> Iterable[Any]:
    """Episodes of a local Minari dataset."""
    return _minari(name).iterate_episodes()


def _minari(name: str) -> Any:
    """A local Minari dataset; nothing is downloaded."""
    try:
        import minari
    except ImportError as error:
        raise UsageError(
            "--data minari:ID needs the extra offline: pip install 'valdi-jax[offline]'"
        ) from error
    try:
        return minari.load_dataset(name)
    except (OSError, ValueError, TypeError) as error:  # TypeError: a name without a version
        local = ", ".join(sorted(minari.list_local_datasets())[:20]) or "none"
        raise UsageError(
            f"--data minari:{name}: no such local dataset (there are: {local}); python -m "
            "valdi_jax.record makes one, minari download fetches one"
        ) from error


READERS: Registry[Callable[[str], Iterable[Any]]] = Registry("--data", {"minari": _read_minari})


def to_episodes(
    recorded: Iterable[Any], interface: Interface, config: Config, name: str = "the recorded data"
) -> list[Episode]:
    """Convert episodes in the environment's terms to the agent's.

    Args:
        recorded: objects with ``observations`` (L + 1, or a dict of such arrays), ``actions`` [L,
            ...], ``rewards`` [L], ``terminations`` [L] and ``truncations`` [L], as Minari's.
        interface: to the environment.
        config: the run's configuration.
        name: of the data, for messages.

    Raises:
        UsageError: if one does not fit, or there are none.
    """
    episodes = []
    for number, each in enumerate(recorded):
        try:
            episodes.append(_to_episode(each, interface, config.frame_stride))
        except (ValueError, AttributeError, IndexError, KeyError, TypeError) as error:
            raise UsageError(f"{name}, episode {number}: {error}") from error
    if not episodes:
        raise UsageError(f"{name} holds no episode")
    return episodes


def digest(episodes: Iterable[Episode], *, ends: bool = True) -> str | None:
    """A checksum of recorded episodes; None if there are none.

    Without ``ends`` it is that of runs which knew no terminations.
    """
    sha, count = hashlib.sha256(), 0
    for episode in episodes:
        count += 1
        for array in (*jax.tree.leaves(episode.observations), episode.actions, episode.rewards):
            sha.update(np.ascontiguousarray(array).tobytes())
        if ends:
            sha.update(bytes([episode.terminated]))
    return sha.hexdigest() if count else None


def _to_episode(recorded: Any, interface: Interface, stride: int) -> Episode:
    rewards = np.asarray(recorded.rewards, np.float32).reshape(-1)
    steps = len(rewards)
    if not steps:
        raise ValueError("it has no step")
    if not np.isfinite(rewards).all():
        raise ValueError("a reward is not finite")
    actions = interface.unact(np.asarray(recorded.actions))
    if len(actions) != steps:
        raise ValueError(f"it has {len(actions)} actions for {steps} rewards")
    if not np.isfinite(actions).all():
        raise ValueError("an action is not finite")
    kept = [*range(0, steps, stride), steps]
    observations = interface.observe_all(_rows(recorded.observations, kept))
    terminated = bool(np.asarray(recorded.terminations)[-1])
    return Episode(
        observations=observations,
        actions=actions,
        rewards=rewards,
        terminated=terminated,
        truncated=not terminated,
        seed=0,
    )


def _rows(observations: Any, rows: list[int]) -> Any:
    """Some observations of arrays [L + 1, ...], of a dict of them, or of a list of dicts."""
    if isinstance(observations, dict):
        return {name: _rows(part, rows) for name, part in observations.items()}
    if isinstance(observations[0], dict):
        return {name: np.stack([observations[i][name] for i in rows]) for name in observations[0]}
    return np.asarray(observations)[rows]
