"""Diffuser in a point maze, beside the controller that collected its data and random actions.

python experiments/mazes.py AGENT --episodes 100 --json mazes.json --figure mazes.png

AGENT is a run, a checkpoint or an exported agent of maze:umaze, medium or large. It drives the same
fixed episodes with the task's own goal, and with a drawn one, which no training has seen as a task.
The figure shows its first plans (coloured) and where it went (black). "Its plans" would be the
returns if it went exactly there: a plan takes its whole horizon, however near the goal is. Shorter
ones (--horizon) may lead through walls: with --replan, a point that has left its plan gets another.

Scores are normalised twice: with D4RL's references, and with 0 for the random actions and 100 for
the controller of these episodes. D4RL's environments are others: the scores that are published for
Diffuser do not compare.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import evidence
import numpy as np
from collect_maze import Waypoints
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.progress import Progress

from valdi_jax import Agent, cli, compilation
from valdi_jax.config import validate
from valdi_jax.data.rollout import Job, first_carries, plan_batch
from valdi_jax.data.source import evaluation_jobs
from valdi_jax.envs.maze import MAZES
from valdi_jax.errors import UsageError
from valdi_jax.evaluate import evaluate, summary
from valdi_jax.observation import Observation

D4RL = {"umaze": (23.85, 161.86), "medium": (13.13, 277.39), "large": (6.7, 273.99)}
TASKS = {"own goal": "", "drawn goal": "-multi"}
RADIUS = 0.45  # within which the goal gives its reward of 1 a step
PLANS = 20  # first plans of so many episodes are valued
DRAWN = 6  # episodes in the figure
QUICK = {"episodes": 2, "max_steps": 20}

Act = Callable[[np.ndarray], np.ndarray]


class Way(NamedTuple):
    """An episode of the agent in the plane."""

    planned: np.ndarray  # [H + 1, 2] positions of its plan
    driven: np.ndarray  # [T + 1, 2]
    goal: np.ndarray  # [2]


def run(
    agent: Agent, episodes: int, on_decision: Callable[[], None] = lambda: None
) -> tuple[list[float], list[Way]]:
    """Drive the first of the fixed episodes: returns, and the ways of the first of these."""
    rollouts = evaluate(
        agent.params,
        agent.config,
        episodes=episodes,
        on_decision=on_decision,
        keep_observations=True,
    )
    ways = []
    # One plan takes seconds, and what plans are worth hardly varies.
    for rollout, job in zip(rollouts[:PLANS], evaluation_jobs(episodes)[:PLANS], strict=True):
        seen = rollout.episode.observations.vector
        first, start = Observation(vector=seen[:1]), (np.zeros(1, np.int32), np.float32(0))
        plan = plan_batch(
            *(agent.params, first, job.key[None], *start, first_carries(1, agent.config)),
            config=agent.config.graph,
        )
        states = np.asarray(plan.carry.rows)[0, :, agent.config.model.action_dim :]
        ways.append(Way(states[:, :2], seen[:, :2], seen[0, 4:6]))
    return [rollout.episode.episode_return for rollout in rollouts], ways


def worth(way: Way, steps: int) -> float:
    """The return of an episode of so many steps that goes exactly where it was planned to."""
    near = np.linalg.norm(way.planned[1:] - way.goal, axis=-1) < RADIUS
    near = np.pad(near, (0, max(steps - len(near), 0)), mode="edge")
    return float(near[:steps].sum())


def drive(agent: Agent, make: Callable[[Any, int], Act], jobs: Sequence[Job]) -> list[float]:
    """Returns of episodes under ``make(maze, seed)``, a controller for each."""
    env, returns = agent.make_env(), []
    for job in jobs:
        observation, _ = env.reset(seed=job.seed)
        act, total, over = make(env.unwrapped.maze, job.seed), 0.0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(act(observation))
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    env.close()
    return returns


def controller(maze: Any, seed: int) -> Act:
    return Waypoints(maze, noise=0.0, seed=seed).act


def random(maze: Any, seed: int) -> Act:
    rng = np.random.default_rng(seed)
    return lambda observation: rng.uniform(-1, 1, 2).astype(np.float32)


def rows_of(layout: str, task: str, returns: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Summaries of one task, normalised both ways."""
    low, high = D4RL[layout]
    own_low, own_high = (float(np.mean(returns[name])) for name in ("random", "controller"))
    rows = []
    for name, values in returns.items():
        numbers = summary(values)
        mean = numbers["mean"]
        assert mean is not None
        rows.append(
            {
                "maze": layout,
                "task": task,
                "driver": name,
                "episodes": len(values),
                **numbers,
                "reached": float(np.mean(np.asarray(values) > 0)),
                "d4rl_normalized": 100 * (mean - low) / (high - low),
                "own_normalized": 100 * (mean - own_low) / (own_high - own_low)
                if own_high > own_low
                else None,
            }
        )
    return rows


def draw(maze: Any, ways: dict[str, Sequence[Way]]) -> Figure:
    """A row for each task, an episode for each column."""
    episodes = max(map(len, ways.values()))
    figure = Figure(figsize=(2.6 * episodes, 2.9 * len(ways)), layout="constrained")
    axes = figure.subplots(len(ways), episodes, squeeze=False)
    half = maze.maze_size_scaling / 2
    for row, (task, each) in zip(axes, ways.items(), strict=True):
        row[0].set_ylabel(task)
        for axis, way in zip(row, each, strict=True):
            for cell in np.argwhere(np.array(maze.maze_map, dtype=str) == "1"):
                corner = maze.cell_rowcol_to_xy(cell) - half
                axis.add_patch(Rectangle(corner, 2 * half, 2 * half, color="0.75", lw=0))
            steps = np.arange(len(way.planned))
            axis.scatter(*way.planned.T, c=steps, cmap="plasma", s=9, zorder=2)
            axis.plot(*way.driven.T, "k-", lw=1, zorder=3)
            axis.plot(*way.driven[0], "o", color="tab:blue", ms=7, zorder=4)
            axis.plot(*way.goal, "*", color="tab:green", ms=13, zorder=4)
            axis.set(aspect="equal", xticks=[], yticks=[])
    return figure


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("agent", metavar="AGENT")
    parser.add_argument("--episodes", type=int, default=100, help="of the 100 fixed ones")
    parser.add_argument("--horizon", type=int, help="steps of a plan; the run's by default")
    parser.add_argument(
        "--replan",
        type=float,
        help="distance from a plan that starts another; 0: none; the run's by default",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="results with what made them")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="plans over the maze (.png)")
    parser.add_argument("--quick", action="store_true", help="a trial of a minute")
    arguments = evidence.parse(parser, argv, {"episodes": QUICK["episodes"]})
    if arguments.horizon is not None and arguments.horizon < 2:
        raise UsageError(f"--horizon is {arguments.horizon}; it must be above 1")
    if arguments.replan is not None and not 0 <= arguments.replan < float("inf"):
        raise UsageError(f"--replan is {arguments.replan}; it must be 0 or a distance")
    return arguments


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    compilation.cache_compilations()
    given = Agent.load(arguments.agent)
    kind, _, name = given.config.env.name.partition(":")
    layout = name.removesuffix("-multi")
    if kind != "maze":
        raise UsageError(f"{arguments.agent} is of {given.config.env.name}, and not of a maze")
    if given.config.planner.diffuser.controller != "waypoints":
        raise UsageError(f"{arguments.agent} is no Diffuser that follows its plans by waypoints")
    steps, horizon = MAZES[layout][2], arguments.horizon or given.config.model.horizon + 1
    settings = given.config.planner.diffuser
    if arguments.replan is not None:
        settings = dataclasses.replace(settings, replan_distance=arguments.replan)
    config = given.config.replace(
        env={"max_steps": steps}, model={"horizon": horizon - 1}, planner={"diffuser": settings}
    )
    validate(config)
    steps = QUICK["max_steps"] if arguments.quick else steps
    jobs, rows, ways = evaluation_jobs(arguments.episodes), [], {}
    print(f"{'task':<12}{'':<12}{'return':>8}{'+- SE':>7}{'median':>8}{'D4RL':>7}{'own':>7}")
    with Progress(transient=True) as bar:
        progress = bar.add_task("driving", total=2 * steps * arguments.episodes)
        for task, suffix in TASKS.items():
            env = {"name": f"maze:{layout}{suffix}", "max_steps": steps}
            agent = Agent(given.params, config.replace(env=env))
            returns, own = run(agent, arguments.episodes, lambda: bar.advance(progress))
            ways[task] = own[:DRAWN]
            found = {
                "Diffuser": returns,
                "its plans": [worth(way, steps) for way in own],
                "controller": drive(agent, controller, jobs),
                "random": drive(agent, random, jobs),
            }
            for row in rows_of(layout, task, found):
                rows.append({"horizon": horizon, "replan_distance": settings.replan_distance} | row)
                bar.console.print(line(row), highlight=False)
            if arguments.json:
                evidence.write(arguments.json, rows, [__file__, *argv])
    if arguments.figure:
        draw(agent.make_env().unwrapped.maze, ways).savefig(arguments.figure, dpi=80)
    return 0


def line(row: dict[str, Any]) -> str:
    """A row of the table; what is not known is -."""
    shown = [f"{row['task']:<12}{row['driver']:<12}"]
    for name, width, digits in (
        ("mean", 8, 1),
        ("standard_error", 7, 1),
        ("median", 8, 1),
        ("d4rl_normalized", 7, 0),
        ("own_normalized", 7, 0),
    ):
        value = row[name]
        shown.append(f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}")
    return "".join(shown)


if __name__ == "__main__":
    cli.run(main)
