"""Recorded episodes, from Minari datasets or from Python."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from valdi_jax.config import Config, EnvConfig
from valdi_jax.data.episode import Episode
from valdi_jax.envs.spaces import Interface
from valdi_jax.errors import UsageError
from valdi_jax.registry import Registry

GIVEN = "python"  # what collect.data says where a program gives the episodes
# Where a dataset that this package records keeps its environment's name, and its settings.
ENVIRONMENT, SETTINGS = "valdi_env", "valdi_env_settings"
_SHAPING = ("action_repeat", "downsample", "pixels", "frames")  # steps and observations


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
    kind, rest = _split(name)
    recorded = READERS[kind](rest)
    for option, value in environment_of(name, config.env.name).items():
        ours = getattr(config.env, option)
        if value != ours:
            raise UsageError(
                f"{name} was recorded with --env.{option.replace('_', '-')} {value}, not {ours}"
            )
    ours = config.env.action_repeat
    if kind == "minari" and ENVIRONMENT not in _minari(rest).storage.metadata:
        theirs = _held(_minari(rest))
        if ours != (theirs or 1):
            said = f"holds actions for {theirs} steps" if theirs else "does not say for how many"
            raise UsageError(
                f"{name} {said}, and --env {config.env.name} for {ours}: give "
                f"--env.action-repeat {theirs or 1}"
            )
    try:
        return to_episodes(recorded, interface, config, name)
    except UsageError as error:
        theirs = environment_of(name).get("name", "an environment that they do not name")
        if theirs == config.env.name:
            raise
        raise UsageError(f"{error} (the data are of {theirs}, not {config.env.name})") from error


def metadata_of(env: EnvConfig) -> dict[str, str]:
    """What a dataset keeps of the environment it was recorded in, for `environment_of`."""
    settings = {name: getattr(env, name) for name in _SHAPING}
    return {ENVIRONMENT: env.name, SETTINGS: json.dumps(settings)}


def environment_of(name: str, chosen: str | None = None) -> dict[str, Any]:
    """The environment of ``--data KIND:ID``: fields of ``config.env``.

    They are its name, and what shapes its steps and observations; nothing if the data do not say,
    and the name alone of another environment that is ``chosen``.

    Raises:
        UsageError: if there is no such data.
    """
    theirs = _environment(name)
    return theirs if chosen in (None, theirs.get("name")) else {"name": chosen}


def _split(name: str) -> tuple[str, str]:
    kind, colon, rest = name.partition(":")
    if not colon:
        raise UsageError(f"--data is KIND:ID, not {name}: --data minari:{name}")
    return kind, rest


def _environment(name: str) -> dict[str, Any]:
    kind, rest = _split(name)
    if kind != "minari":
        return {}
    data = _minari(rest)
    known = data.storage.metadata
    if ENVIRONMENT in known:
        settings = json.loads(str(known.get(SETTINGS, "{}")))
        return {"name": str(known[ENVIRONMENT])} | {
            option: int(value) for option, value in settings.items() if option in _SHAPING
        }
    if data.env_spec is None:
        return {}
    held = _held(data)
    return {"name": f"gym:{data.env_spec.id}"} | ({} if held == 1 else {"action_repeat": held})


def _held(data: Any) -> int | None:
    """For how many steps the recorded environment held actions; none if it is not known."""
    if data.env_spec is None:
        return None
    wrappers = data.env_spec.additional_wrappers
    repeats = (w.kwargs["num_repeats"] for w in wrappers if w.name == "RepeatAction")
    return math.prod(repeats)


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
        try:
            local = ", ".join(sorted(minari.list_local_datasets())[:20]) or "none"
        except (OSError, ValueError) as failure:  # a folder that is none
            local = f"unknown, {failure}"
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
    counts = _counts(recorded.observations)
    if counts != {steps + 1}:
        found = " and ".join(map(str, sorted(counts)))
        raise ValueError(f"it has {found} observations for {steps} rewards, not {steps + 1}")
    for flags in (recorded.terminations, recorded.truncations):
        ends = np.asarray(flags, bool).reshape(-1)
        if len(ends) != steps or ends[:-1].any():
            raise ValueError("it ends before its last step, or its flags are not one a step")
    kept = [*range(0, steps, stride), steps]
    observations = interface.observe_all(_rows(recorded.observations, kept))
    terminated = bool(np.asarray(recorded.terminations).reshape(-1)[-1])
    return Episode(
        observations=observations,
        actions=actions,
        rewards=rewards,
        terminated=terminated,
        truncated=not terminated,
        seed=0,
    )


def _counts(observations: Any) -> set[int]:
    """Of the observations in arrays, in each of a dict of them, or in a list."""
    if isinstance(observations, dict):
        return set().union(*map(_counts, observations.values()))
    return {len(observations)}


def _rows(observations: Any, rows: list[int]) -> Any:
    """Some observations of arrays [L + 1, ...], of a dict of them, or of a list of dicts."""
    if isinstance(observations, dict):
        return {name: _rows(part, rows) for name, part in observations.items()}
    if isinstance(observations[0], dict):
        return {name: np.stack([observations[i][name] for i in rows]) for name in observations[0]}
    return np.asarray(observations)[rows]
