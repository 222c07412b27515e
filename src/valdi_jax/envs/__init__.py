"""Environments by name."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import traceback
from collections.abc import Callable, Sequence
from typing import cast

import gymnasium as gym
import numpy as np

from valdi_jax.config import EnvConfig
from valdi_jax.envs.carracing import make_carracing
from valdi_jax.envs.dmc import make_dmc
from valdi_jax.envs.maze import make_maze
from valdi_jax.envs.spaces import Interface
from valdi_jax.envs.wrappers import Limited, paced, with_fresh_worlds
from valdi_jax.errors import UsageError


def make_env(config: EnvConfig, *, training: bool, render_mode: str | None = None) -> gym.Env:
    """Make the environment that a configuration names.

    Args:
        config: which environment, and how long its episodes are.
        training: if true, ``patience`` applies; if false, CarRacing episodes continue through
            terminal states, as in the paper's score.
        render_mode: ``"rgb_array"`` for videos.

    Raises:
        UsageError: if the name is unknown, or the environment cannot be made.
    """
    patience = config.patience if training else 0
    if config.name == "carracing":
        return make_carracing(
            max_steps=config.max_steps,
            action_repeat=config.action_repeat,
            downsample=config.downsample,
            patience=patience,
            through_terminals=not training,
            render_mode=render_mode,
        )
    if config.name.startswith("dmc:"):
        return make_dmc(
            config.name.removeprefix("dmc:"),
            max_steps=config.max_steps,
            action_repeat=config.action_repeat,
            patience=patience,
            pixels=config.pixels,
            frames=config.frames,
            render_mode=render_mode,
        )
    if config.name in _NAMED:
        env = _NAMED[config.name](max_steps=config.max_steps, render_mode=render_mode)
    elif config.name.startswith("maze:"):
        name = config.name.removeprefix("maze:")
        env = make_maze(name, max_steps=config.max_steps, render_mode=render_mode)
    elif config.name.startswith("gym:"):
        env = make_registered(
            config.name.removeprefix("gym:"), max_steps=config.max_steps, render_mode=render_mode
        )
    elif config.name == "gym":
        raise UsageError(
            "the environment 'gym' is one that a program of your own makes: go on and score there "
            "(train and evaluate take make=...), or name one: --env pendulum, say, or --env gym:ID"
        )
    else:
        near = difflib.get_close_matches(config.name.lower(), ["carracing", *_NAMED], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(
            f"unknown environment {config.name!r}: {hint}gym:ID takes any that is registered with "
            "Gymnasium"
        )
    return paced(env, action_repeat=config.action_repeat, patience=patience)


def import_modules(names: Sequence[str]) -> None:
    """Import modules that register environments, here and in the worker processes.

    Raises:
        UsageError: if one cannot be imported.
    """
    if names:
        os.environ[_IMPORTS] = ",".join(names)
        _import_modules()


def imported_modules() -> list[str]:
    """Names that were given to `import_modules`."""
    return list(filter(None, os.environ.get(_IMPORTS, "").split(",")))


_IMPORTS = "VALDI_JAX_IMPORT"  # processes inherit it; a configuration file cannot set it


def _reason(error: Exception) -> str:
    """An exception in one line; where it says nothing, the place that raised it."""
    said = str(error).strip()
    if not said:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{place.line} ({place.filename}, line {place.lineno})"
    return f"{type(error).__name__}: {said}".splitlines()[0][:300]


def _import_modules() -> None:
    for name in imported_modules():
        try:
            importlib.import_module(name)
        except Exception as error:  # a module may raise anything
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise UsageError(f"--env.import: cannot import {name!r}: {reason}") from error


def make_registered(
    name: str, *, max_steps: int, render_mode: str | None = None, **settings: object
) -> gym.Env:
    """Make an environment that is registered with Gymnasium.

    Args:
        name: its ID.
        max_steps: environment steps after which an episode is truncated; 0 for its own limit.
        render_mode: of the environment, as are all other ``settings``.

    Raises:
        UsageError: if it is unknown, cannot be made, or has no limit on its episodes.
    """
    if ":" in name:
        raise UsageError(
            f"gym:{name} names a module to import, and a configuration may not import code: "
            f"--env gym:{name.split(':')[1]} --env.import {name.split(':')[0]}"
        )
    _import_modules()
    if render_mode is not None:  # else omitted: not every environment accepts it
        settings["render_mode"] = render_mode
    try:
        env = gym.make(
            name,
            max_episode_steps=max_steps or None,
            disable_env_checker=True,
            **settings,
        )
    except Exception as error:  # anything, e.g. a missing package or argument
        reason = _reason(error)
        hint = (
            "--env.import names a module that registers it"
            if isinstance(error, gym.error.UnregisteredEnv)
            else "one that needs arguments is made by a program of your own "
            "(docs/your-environment.md)"
        )
        raise UsageError(f"cannot make the environment gym:{name}: {reason}; {hint}") from error
    if env.spec is None or env.spec.max_episode_steps is None:
        env.close()
        raise UsageError(f"gym:{name} has no time limit of its own: give one with --env.max-steps")
    return with_fresh_worlds(env)


_NAMED: dict[str, Callable[..., gym.Env]] = {
    "pendulum": functools.partial(make_registered, "Pendulum-v1"),
    "mountaincar": functools.partial(make_registered, "MountainCarContinuous-v0"),
    "lunarlander": functools.partial(make_registered, "LunarLander-v3", continuous=True),
    "bipedalwalker": functools.partial(make_registered, "BipedalWalker-v3"),
    "bipedalwalker-hardcore": functools.partial(make_registered, "BipedalWalkerHardcore-v3"),
}


def own_env(make: Callable[..., gym.Env], config: EnvConfig, *, training: bool) -> gym.Env:
    """An environment of a custom factory, truncated after ``config.max_steps`` like named ones.

    Raises:
        UsageError: if its episodes have no limit, it does not hold actions as configured, or is no
            environment; or if the factory cannot be called as it has to be.
    """
    if reason := _takes_not(make, config, training=training):
        raise UsageError(
            f"make={make!r} is not a function make(config.env, training=...): {reason}"
        )
    env = make(config, training=training)
    if make is make_env:
        return env
    if not hasattr(env, "reset"):
        raise UsageError(f"the factory made no environment but {env!r}: it has to return one")
    if reason := _takes_not(env.reset, seed=0):
        env.close()
        raise UsageError(f"the environment's reset() has to take a seed, as in Gymnasium: {reason}")
    env = with_fresh_worlds(env)
    spec = getattr(env, "spec", None)
    limit = spec.max_episode_steps if spec is not None else None
    inner, holds = env, 1
    while isinstance(inner, gym.Wrapper):
        if isinstance(inner, gym.wrappers.TimeLimit):
            limit = inner._max_episode_steps
        if isinstance(inner, gym.wrappers.RepeatAction):
            holds *= inner.num_repeats
        inner = inner.env
    if config.action_repeat not in (1, holds):
        env.close()
        raise UsageError(
            f"env.action_repeat is {config.action_repeat}, but the factory's environment repeats "
            f"actions {holds} times: wrap it in gymnasium.wrappers.RepeatAction, or leave it at 1"
        )
    if config.max_steps:  # whatever limit it has, of steps or of holds
        holds = -(-config.max_steps // config.action_repeat)  # a factory holds actions by itself
        return cast(gym.Env, Limited(env, holds))
    if limit is not None:
        return env
    env.close()
    raise UsageError(
        "the environment has no time limit: give --env.max-steps (env.max_steps), or wrap it in "
        "gymnasium.wrappers.TimeLimit"
    )


def _takes_not(call: Callable[..., object], *args: object, **kwargs: object) -> str:
    """Why a call cannot be made with these arguments; empty if it can."""
    try:
        inspect.signature(call).bind(*args, **kwargs)
    except ValueError:  # a built-in that does not say what it takes
        pass
    except TypeError as error:
        return str(error)
    return ""


def interface_of(factory: Callable[[], gym.Env]) -> Interface:
    """The agent's interface to the environments that a factory makes.

    Raises:
        UsageError: if their observations or actions are not supported.
    """
    env = factory()
    try:
        return Interface(env.observation_space, env.action_space)
    finally:
        env.close()


def evaluation_seeds(count: int) -> list[int]:
    """The first ``count`` of the 100 fixed reset seeds (CarRacing: tracks) of evaluation.

    Raises:
        UsageError: if ``count`` is not in 1 .. 100.
    """
    if not 1 <= count <= 100:
        raise UsageError(f"between 1 and 100 evaluation episodes are possible, not {count}")
    seeds = np.random.default_rng(12345).integers(0, 2**31 - 1, size=100, dtype=np.int64)
    return [int(seed) for seed in seeds[:count]]
