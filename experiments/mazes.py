"""Diffuser in a point maze, beside the controller that collected its data and random actions.

python experiments/mazes.py AGENT --episodes 100 --json mazes.json --figure mazes.png

AGENT is a run, a checkpoint or an exported agent of maze:umaze, medium or large. It drives the same
fixed episodes with the task's own goal, and with a drawn one, which no training has seen as a task.
The figure shows its plans (coloured) and where it went (black). "Its plans" would be the returns if
it went exactly there: a plan takes its whole horizon, however near the goal is.

Scores are normalised twice: with D4RL's references, and with 0 for the random actions and 100 for
the controller of these episodes. D4RL's environments are others: the scores that are published for
Diffuser do not compare.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import evidence
import numpy as np
from collect_maze import Waypoints
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.progress import Progress

from valdi_jax import Agent, cli, compilation
from valdi_jax.config import validate
from valdi_jax.data.rollout import Job
from valdi_jax.data.source import evaluation_jobs
from valdi_jax.envs.maze import MAZES
from valdi_jax.errors import UsageError
from valdi_jax.evaluate import evaluate, summary
from valdi_jax.observation import Observation
from valdi_jax.planners import first_carry, plan

D4RL = {"umaze": (23.85, 161.86), "medium": (13.13, 277.39), "large": (6.7, 273.99)}
TASKS = {"own goal": "", "drawn goal": "-multi"}
RADIUS = 0.45  # within which the goal gives its reward of 1 a step
DRAWN = 6  # episodes in the figure
TRIAL = {"episodes": 2, "max_steps": 20}

Act = Callable[[np.ndarray], np.ndarray]


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


def follow_plans(agent: Agent, jobs: Sequence[Job]) -> list[float]:
    """Returns of episodes that go exactly where the plan of their first observation does."""
    env = agent.make_env()
    first = np.stack([env.reset(seed=job.seed)[0] for job in jobs])
    rows = np.asarray(agent.plan(first).carry.rows)[..., agent.config.model.action_dim :]
    near = np.linalg.norm(rows[:, 1:, :2] - first[:, None, 4:6], axis=-1) < RADIUS
    steps = agent.config.env.max_steps
    near = np.pad(near, ((0, 0), (0, max(steps - near.shape[1], 0))), mode="edge")
    return [float(total) for total in near[:, :steps].sum(axis=1)]


def score(agent: Agent, episodes: int, on_decision: Callable[[], None]) -> dict[str, list[float]]:
    """Returns of the agent, its plans, the controller and random actions on the same episodes."""
    jobs = evaluation_jobs(episodes)
    rollouts = evaluate(agent.params, agent.config, episodes=episodes, on_decision=on_decision)
    return {
        "Diffuser": [rollout.episode.episode_return for rollout in rollouts],
        "its plans": follow_plans(agent, jobs),
        "controller": drive(agent, controller, jobs),
        "random": drive(agent, random, jobs),
    }


def rows_of(layout: str, task: str, returns: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Summaries of one task, normalised both ways."""
    low, high = D4RL[layout]
    own_low, own_high = (np.mean(returns[name]) for name in ("random", "controller"))
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
                "own_normalized": float(100 * (mean - own_low) / max(own_high - own_low, 1e-9)),
            }
        )
    return rows


def follow(agent: Agent, job: Job) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """One episode: its maze, the planned and the driven positions [n, 2], and the goal [2]."""
    env = agent.make_env()
    observation, _ = env.reset(seed=job.seed)
    goal, carry = observation[4:6].copy(), first_carry(agent.config)
    planned, path, over = None, [observation[:2]], False
    while not over:
        seen = Observation(vector=observation.astype(np.float32))
        answer = plan(agent.params, seen, job.key, config=agent.config, carry=carry)
        carry = answer.carry
        if planned is None:
            planned = np.asarray(carry.rows)[:, agent.config.model.action_dim :][:, :2]
        observation, _, terminated, truncated, _ = env.step(np.asarray(answer.actions[0]))
        path.append(observation[:2])
        over = terminated or truncated
    return env.unwrapped.maze, planned, np.stack(path), goal


def draw(agents: dict[str, Agent], episodes: int) -> Figure:
    """A row for each task, an episode for each column."""
    figure = Figure(figsize=(2.6 * episodes, 2.9 * len(agents)), layout="constrained")
    axes = figure.subplots(len(agents), episodes, squeeze=False)
    for row, (task, agent) in zip(axes, agents.items(), strict=True):
        for axis, job in zip(row, evaluation_jobs(episodes), strict=True):
            maze, planned, path, goal = follow(agent, job)
            half = maze.maze_size_scaling / 2
            for i, cells in enumerate(maze.maze_map):
                for j, cell in enumerate(cells):
                    x, y = maze.cell_rowcol_to_xy(np.array([i, j]))
                    if cell == 1:
                        corner = x - half, y - half
                        axis.add_patch(Rectangle(corner, 2 * half, 2 * half, color="0.75", lw=0))
            steps = np.arange(len(planned))
            axis.scatter(*planned.T, c=steps, cmap="plasma", s=9, zorder=2)
            axis.plot(*path.T, "k-", lw=1, zorder=3)
            axis.plot(*path[0], "o", color="tab:blue", ms=7, zorder=4)
            axis.plot(*goal, "*", color="tab:green", ms=13, zorder=4)
            axis.set(aspect="equal", xticks=[], yticks=[])
        row[0].set_ylabel(task)
    return figure


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("agent", metavar="AGENT")
    parser.add_argument("--episodes", type=int, default=100, help="of the 100 fixed ones")
    parser.add_argument("--horizon", type=int, help="steps of a plan; the run's by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="results with what made them")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="plans over the maze (.png)")
    parser.add_argument("--quick", action="store_true", help="a trial of a minute")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.episodes = TRIAL["episodes"]
    return arguments


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    compilation.cache_compilations()
    given = Agent.load(arguments.agent)
    kind, _, name = given.config.env.name.partition(":")
    layout = name.removesuffix("-multi")
    if kind != "maze" or not given.config.diffuses_plans:
        raise UsageError(f"{arguments.agent} is no Diffuser of a maze, but of {kind}:{name}")
    horizon = arguments.horizon or given.config.model.horizon + 1
    steps = MAZES[layout][2]
    config = given.config.replace(env={"max_steps": steps}, model={"horizon": horizon - 1})
    validate(config)
    steps = TRIAL["max_steps"] if arguments.quick else steps
    agents = {}
    for task, suffix in TASKS.items():
        env = {"name": f"maze:{layout}{suffix}", "max_steps": steps}
        agents[task] = Agent(given.params, config.replace(env=env))
    rows = []
    print(f"{'task':<12}{'':<12}{'return':>8}{'+- SE':>7}{'median':>8}{'D4RL':>7}{'own':>7}")
    with Progress(transient=True) as bar:
        total = 2 * steps * arguments.episodes
        progress = bar.add_task("driving", total=total)
        for task, agent in agents.items():
            returns = score(agent, arguments.episodes, lambda: bar.advance(progress))
            for row in rows_of(layout, task, returns):
                rows.append(row)
                bar.console.print(
                    f"{task:<12}{row['driver']:<12}{row['mean']:>8.1f}"
                    f"{row['standard_error'] or np.nan:>7.1f}{row['median']:>8.1f}"
                    f"{row['d4rl_normalized']:>7.0f}{row['own_normalized']:>7.0f}",
                    highlight=False,
                )
            if arguments.json:
                evidence.write(arguments.json, rows, sys.argv)
    if arguments.figure:
        draw(agents, min(DRAWN, arguments.episodes)).savefig(arguments.figure, dpi=80)
    return 0


if __name__ == "__main__":
    cli.run(main)
