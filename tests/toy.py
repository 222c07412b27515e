"""A small Gymnasium environment with known rewards."""

from __future__ import annotations

import dataclasses
import time

import gymnasium as gym
import numpy as np

from valdi_jax.config import Config
from valdi_jax.presets import PRESETS

CONFIG: Config = dataclasses.replace(
    PRESETS["tiny"],
    env=dataclasses.replace(PRESETS["tiny"].env, name="toy", max_steps=30),
    learn=dataclasses.replace(PRESETS["tiny"].learn, batch_size=8),
    eval=dataclasses.replace(PRESETS["tiny"].eval, every=2, episodes=2),
)


class Counting(gym.Env):
    """Counts its steps: the vector is (seed mod 1000, steps), the reward the step's number.

    It terminates after ``length`` steps if that is less than ``max_steps``, at which it truncates.
    The 1000 keeps the seed exact in float32.
    """

    observation_space = gym.spaces.Dict(vector=gym.spaces.Box(-np.inf, np.inf, (2,), np.float32))
    action_space = gym.spaces.Box(-1, 1, (3,), np.float32)

    def __init__(self, length=1000, max_steps=30, fail_at=None, hang_at=None, reward=1):
        self.length, self.max_steps, self.reward = length, max_steps, reward
        self.fail_at, self.hang_at = fail_at, hang_at

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.steps = seed % 1000, 0
        return self._observation(), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, np.float32)), action
        self.steps += 1
        if self.steps == self.fail_at:
            raise OSError("the road is closed")
        if self.steps == self.hang_at:
            time.sleep(600)
        terminated = self.steps >= self.length
        truncated = not terminated and self.steps >= self.max_steps
        return self._observation(), float(self.reward * self.steps), terminated, truncated, {}

    def _observation(self):
        return {"vector": np.array([self.seed, self.steps], np.float32)}


def make_counting(config, *, training, **settings) -> Counting:
    return Counting(max_steps=config.max_steps, **settings)
