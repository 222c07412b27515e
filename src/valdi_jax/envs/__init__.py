"""Environments by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import gymnasium as gym
import numpy as np

from valdi_jax.config import Config, EnvConfig
from valdi_jax.envs.carracing import make_carracing
from valdi_jax.errors import UsageError
from valdi_jax.types import Observation

_FACTORIES: dict[str, Callable[..., gym.Env]] = {"carracing": make_carracing}


def make_env(config: EnvConfig, *, training: bool, render_mode: str | None = None) -> gym.Env:
    """The environment that a configuration names.

    Its observations are dicts of ``image`` (uint8) and ``vector`` (float32), either of which may
    be absent; its actions lie in [-1, 1].

    Args:
        config: which environment, and how long its episodes are.
        training: whether its episodes train an agent (then ``patience`` holds) or score one
            (then a CarRacing episode goes on through terminal states, as the paper's score does).
        render_mode: ``"rgb_array"`` for videos.

    Raises:
        UsageError: if there is no environment of that name.
    """
    if config.name not in _FACTORIES:
        near = difflib.get_close_matches(config.name, _FACTORIES, n=1, cutoff=0)
        raise UsageError(f"unknown environment {config.name!r}: did you mean {near[0]!r}?")
    env = _FACTORIES[config.name](
        max_steps=config.max_steps, through_terminals=not training, render_mode=render_mode
    )
    if training and config.patience:
        env = Patience(env, config.patience)
    return env


class Patience(gym.Wrapper):
    """Truncates an episode after ``patience`` steps in a row without a positive reward."""

    def __init__(self, env: gym.Env, patience: int):
        super().__init__(env)
        self.patience = patience
        self._unrewarded = 0

    def reset(self, **kwargs):
        self._unrewarded = 0
        return self.env.reset(**kwargs)

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._unrewarded = 0 if reward > 0 else self._unrewarded + 1
        return observation, reward, terminated, truncated or self._unrewarded >= self.patience, info


def example_observation(factory: Callable[[], gym.Env], config: Config) -> Observation:
    """An all-zero observation of an environment, after a look at its actions.

    Raises:
        UsageError: if its actions are not those that the configuration is for.
    """
    env = factory()
    observations, actions = env.observation_space, env.action_space
    env.close()
    if actions.shape != (config.model.action_dim,):
        raise UsageError(
            f"--model.action-dim is {config.model.action_dim}, but the environment's actions have "
            f"shape {actions.shape}"
        )
    return Observation(
        **{name: np.zeros(box.shape, box.dtype) for name, box in observations.items()}
    )


def evaluation_seeds(count: int) -> list[int]:
    """The first ``count`` of the 100 fixed reset seeds that agents are compared on.

    Raises:
        UsageError: if ``count`` is not in 1 .. 100.
    """
    if not 1 <= count <= 100:
        raise UsageError(f"there are 100 fixed tracks, so between 1 and 100 can be driven: {count}")
    seeds = np.random.default_rng(12345).integers(0, 2**31 - 1, size=100, dtype=np.int64)
    return [int(seed) for seed in seeds[:count]]
