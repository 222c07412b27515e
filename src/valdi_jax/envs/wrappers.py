"""Gymnasium wrappers for step length and episode ends."""

from __future__ import annotations

from typing import Any

import gymnasium as gym


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
        self._unrewarded = 0 if float(reward) > 0 else self._unrewarded + 1
        return observation, reward, terminated, truncated or self._unrewarded >= self.patience, info


class ThroughTerminals(gym.Wrapper):
    """Continues through terminal states to the time limit, and reports them only there.

    This is the paper's score: every frame counts, including those after a finished lap and those
    outside the playfield (-100 each).
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self._terminated = False

    def reset(self, **kwargs):
        self._terminated = False
        return self.env.reset(**kwargs)

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._terminated |= terminated
        return observation, reward, truncated and self._terminated, truncated, info


class Limited:
    """Truncates the episodes of any object that acts like an environment.

    Unlike Gymnasium's wrapper it asks nothing else of it: neither its class nor the arguments of
    its reset.
    """

    def __init__(self, env: gym.Env, steps: int):
        self._env, self._limit, self._steps = env, steps, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in ("_env", "_limit", "_steps")
        object.__setattr__(self if own else self._env, name, value)

    def reset(self, **kwargs):
        self._steps = 0
        return self._env.reset(**kwargs)

    def step(self, action):
        answer = self._env.step(action)
        self._steps += 1
        if self._steps < self._limit or not isinstance(answer, tuple) or len(answer) != 5:
            return answer
        observation, reward, terminated, _, info = answer
        return observation, reward, terminated, True, info


class FreshWorld(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Gives a Box2D environment a new world at each reset, so that a seed makes the same episode.

    Gymnasium's BipedalWalker keeps its world, in which the order of contacts, and so the walker's
    motion, depends on the terrains that were there before.
    """

    def __init__(self, env: gym.Env):
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)

    def reset(self, **kwargs):
        inner: Any = self.unwrapped
        inner._destroy()
        inner.world = type(inner.world)()
        return self.env.reset(**kwargs)


def with_fresh_worlds(env: gym.Env) -> gym.Env:
    """The environment, in `FreshWorld` if it is Gymnasium's BipedalWalker."""
    classes = type(getattr(env, "unwrapped", env)).__mro__
    walks = any(each.__module__ == "gymnasium.envs.box2d.bipedal_walker" for each in classes)
    return FreshWorld(env) if walks else env


def paced(env: gym.Env, *, action_repeat: int, patience: int) -> gym.Env:
    """Hold each action for ``action_repeat`` steps, and add patience (0: none) in holds."""
    if action_repeat > 1:
        env = gym.wrappers.RepeatAction(env, action_repeat)
    return Patience(env, patience) if patience else env
