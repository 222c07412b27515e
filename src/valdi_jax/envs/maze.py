"""Point mazes of gymnasium-robotics, as Diffuser's goal-reaching tasks."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from valdi_jax.errors import UsageError

# D4RL's target, the row and column of its cell, and the steps of an episode.
MAZES = {
    "umaze": ("PointMaze_UMaze-v3", (1, 1), 300),
    "medium": ("PointMaze_Medium-v3", (6, 6), 600),
    "large": ("PointMaze_Large-v3", (7, 9), 800),
}


class PointMaze(gym.ObservationWrapper):
    """Observes x, y, their velocities and the goal's x, y; the goal is D4RL's, or any."""

    def __init__(self, env: gym.Env, goal: tuple[int, int] | None):
        super().__init__(env)
        self._goal = goal
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (6,), np.float64)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        if self._goal is not None:
            options = {"goal_cell": np.array(self._goal)} | (options or {})
        return super().reset(seed=seed, options=options)

    def observation(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([observation["observation"], observation["desired_goal"]])


def make_maze(
    name: str, *, max_steps: int = 0, wander: bool = False, render_mode: str | None = None
) -> gym.Env:
    """A point maze: ``umaze``, ``medium`` or ``large``; with ``-multi`` the goal is drawn.

    Args:
        name: of the maze.
        max_steps: of an episode; 0 for the task's own.
        wander: draw another goal whenever it is reached, to collect data.
        render_mode: ``"rgb_array"`` for videos.

    Raises:
        UsageError: if the name is unknown, or gymnasium-robotics is missing.
    """
    layout, _, multi = name.partition("-")
    if layout not in MAZES or multi not in ("", "multi"):
        raise UsageError(f"unknown maze {name!r}: choose one of {', '.join(MAZES)}, or NAME-multi")
    try:
        import gymnasium_robotics
    except ImportError as error:
        raise UsageError(
            f"maze:{name} needs the extra: pip install 'valdi-jax[maze]' ({error})"
        ) from error
    gym.register_envs(gymnasium_robotics)
    env_id, target, steps = MAZES[layout]
    env = gym.make(
        env_id,
        continuing_task=True,  # it stays at the goal, and collects reward
        reset_target=wander,
        max_episode_steps=max_steps or steps,
        render_mode=render_mode,
        disable_env_checker=True,
    )
    return PointMaze(env, None if multi else target)
