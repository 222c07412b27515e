"""Collect a maze's data with a waypoint controller, as D4RL's: a point that wanders to drawn goals.

python experiments/collect_maze.py umaze minari:maze/umaze-v0 --steps 1000000
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Sequence

import numpy as np
from rich.progress import track

from valdi_jax import cli
from valdi_jax.config import EnvConfig
from valdi_jax.envs.maze import MAZES, make_maze
from valdi_jax.record import record

STREAM = 10_000  # steps of an episode: one stream, which no reset cuts
GAINS = 10.0, -1.0  # on the way to the waypoint, and on the velocity
NEAR = 0.1  # where the next waypoint begins
SHIFT = 0.2  # of a waypoint within its cell


class Waypoints:
    """Follows the shortest way through the maze's cells to the goal.

    Args:
        maze: of gymnasium-robotics.
        noise: standard deviation of the noise on actions.
        seed: of the noise and the waypoints.
    """

    def __init__(self, maze, *, noise: float = 0.5, seed: int = 0):
        self._maze, self._noise = maze, noise
        self._rng = np.random.default_rng(seed)
        self.reset()

    def reset(self) -> None:
        self._goal, self._waypoint = None, None

    def act(self, observation: np.ndarray) -> np.ndarray:
        place, velocity, goal = observation[:2], observation[2:4], observation[4:6]
        if self._goal is None or not np.array_equal(goal, self._goal):
            self._goal, self._waypoint = goal.copy(), None
            self._distances = self._search(self._cell(goal))
        if self._waypoint is None or np.linalg.norm(place - self._waypoint) < NEAR:
            self._waypoint = self._next(self._cell(place))
        action = GAINS[0] * (self._waypoint - place) + GAINS[1] * velocity
        action = action + self._noise * self._rng.standard_normal(2)
        return np.clip(action, -1, 1).astype(np.float32)

    def _cell(self, place: np.ndarray) -> tuple[int, int]:
        row, column = self._maze.cell_xy_to_rowcol(place)
        return int(row), int(column)

    def _free(self, cell: tuple[int, int]) -> bool:
        return self._maze.maze_map[cell[0]][cell[1]] != 1

    def _around(self, cell: tuple[int, int]):
        for row, column in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            near = cell[0] + row, cell[1] + column
            if self._free(near):
                yield near

    def _search(self, goal: tuple[int, int]) -> dict[tuple[int, int], int]:
        """Steps to the goal from each cell, breadth first."""
        distances, queue = {goal: 0}, deque([goal])
        while queue:
            cell = queue.popleft()
            for near in self._around(cell):
                if near not in distances:
                    distances[near] = distances[cell] + 1
                    queue.append(near)
        return distances

    def _next(self, cell: tuple[int, int]) -> np.ndarray:
        if self._distances[cell] <= 1:
            return self._goal
        near = min(self._around(cell), key=self._distances.__getitem__)
        centre = self._maze.cell_rowcol_to_xy(np.array(near))
        return centre + self._rng.uniform(-SHIFT, SHIFT, 2)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("maze", choices=MAZES)
    parser.add_argument("data", metavar="minari:ID", help="dataset to write")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error("--steps has to be at least 1")
    stream = min(STREAM, arguments.steps)
    env = make_maze(f"{arguments.maze}-multi", max_steps=stream, wander=True)
    controller = Waypoints(env.unwrapped.maze, seed=arguments.seed)
    record(
        env,
        controller,
        arguments.data.removeprefix("minari:"),
        episodes=-(-arguments.steps // stream),
        seed=arguments.seed,
        each=lambda numbers: track(numbers, description=f"{arguments.steps} steps"),
        description="waypoint controller",
        env_config=EnvConfig(name=f"maze:{arguments.maze}", max_steps=stream),
    )


if __name__ == "__main__":
    cli.run(main)
