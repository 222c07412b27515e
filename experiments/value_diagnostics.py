"""How well values hold along imagined plans (the paper's Table 1): TD error and drift.

python experiments/value_diagnostics.py carracing carracing-mlp --json values.json

With z_0 the encoded observation, z_1 .. z_H imagined under the chosen plan, R and V the heads:

    TD error h = 0 .. H-1    R(z_h, a_h) + gamma^C V(z_h+1) - V(z_h)
    drift    h = 1 .. H      V(observation of decision t + h) - V(z_h imagined at decision t)

in rewards. One drive through the fixed episodes, without noise and with the keys of an evaluation,
serves both: drift is taken from the first --steps of each episode, TD errors from --states of all
decisions, evenly spread; episodes go on for as long as these need. Each chosen plan is imagined
anew with noise of its own: that for which the search chose it would flatter it.

± is the standard error over states. Those of one episode hang together; the JSON also has the error
with episodes as units.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import evidence
import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax import Agent, cli, model
from valdi_jax.config import Config
from valdi_jax.data.rollout import Job
from valdi_jax.data.source import evaluation_jobs
from valdi_jax.envs.workers import Stepper
from valdi_jax.evaluate import summary
from valdi_jax.observation import Observation
from valdi_jax.planners import first_carry, plan
from valdi_jax.types import Array, Params

PAPER = {
    "td": {
        "paper, CarRacing: Valdi": (3.28, 2.17, 2.00, 1.93, 1.95),
        "paper, CarRacing: MLP": (2.05, 2.00, 2.07, 2.19, 2.23),
    },
    "drift": {
        "paper, CarRacing: Valdi": (-1.53, -2.11, -2.56, -3.04, -3.52),
        "paper, CarRacing: MLP": (-0.62, -1.21, -1.93, -2.76, -3.65),
    },
}


def td_errors(
    reward: Callable[[Array, Array], Array],
    value: Callable[[Array], Array],
    trajectory: Array,
    chunks: Array,
    discount: float,
) -> Array:
    """TD errors [H] along latents [H + 1, D] under chunks [H, C * A]; one discount a chunk."""
    values = value(trajectory)
    return reward(trajectory[:-1], chunks) + discount * values[1:] - values[:-1]


def drifts(values: np.ndarray) -> list[np.ndarray]:
    """Real minus imagined values [T - h], for h = 1 .. H.

    ``values`` [T, H + 1] are of what decision t saw (column 0), and of h decisions ahead as it
    imagined them (column h).
    """
    return [values[h:, 0] - values[:-h, h] for h in range(1, values.shape[1])]


@functools.partial(jax.jit, static_argnames=("config",))
def decide(
    params: Params,
    observation: Observation,
    keys: tuple[Array, Array],
    decision: Array,
    carry: Any,
    *,
    config: Config,
) -> tuple[Array, Any, Array, Array]:
    """Plan from one observation, and imagine the plan; keys are the search's and the noise's.

    Returns: actions [C, A], the planner's carry, values [H + 1] and TD errors [H], in rewards.
    """
    search_key, noise_key = (jax.random.fold_in(key, decision) for key in keys)
    chosen = plan(params, observation, search_key, config=config, carry=carry)
    sizes, learn = config.model, config.learn
    z = model.encode(params, observation, config=config)
    chunks = chosen.actions.reshape(sizes.horizon, -1)
    noise = jax.random.normal(noise_key, (sizes.horizon, sizes.latent_dim))
    steps = config.planner.diffusion_steps
    imagined = model.imagine(params["dynamics"], z, chunks, noise, config=sizes, steps=steps)
    trajectory = jnp.concatenate([z[None], imagined])
    value = functools.partial(model.value, params, config=config)
    reward = functools.partial(model.reward, params, config=config)
    errors = td_errors(reward, value, trajectory, chunks, learn.discount**sizes.chunk)
    scale = learn.reward_scale
    actions = chosen.actions[: sizes.chunk]
    return actions, chosen.carry, value(trajectory) / scale, errors / scale


def drive(
    agent: Agent, jobs: Sequence[Job], decisions: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Values [T, H + 1] and TD errors [T, H] at the decisions of each episode, at most so many."""
    config = agent.config.graph
    env = Stepper(agent.make_env, last_only=True)
    values: list[np.ndarray] = []
    errors: list[np.ndarray] = []
    for job in jobs:
        keys = job.key, jax.random.fold_in(jax.random.key(1), job.seed)
        observation, carry = env.reset(job.seed), jax.device_get(first_carry(config))
        numbers = []
        for decision in range(decisions):
            actions, carry, *both = jax.device_get(
                decide(agent.params, observation, keys, np.int32(decision), carry, config=config)
            )
            numbers.append(both)
            steps = env.step(actions)
            if steps.terminated or steps.truncated:
                break
            observation = steps.observations[-1]
        of_episode = zip(*numbers, strict=True)
        for collected, column in zip((values, errors), of_episode, strict=True):
            collected.append(np.stack(column))
    env.close()
    return values, errors


def spread_over(episodes: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """About evenly spaced rows, ``count`` in all if there are so many, still by episode."""
    owner = np.repeat(np.arange(len(episodes)), [len(rows) for rows in episodes])
    at = np.linspace(0, len(owner) - 1, min(count, len(owner))).round().astype(int)
    chosen, owner = np.concatenate(episodes)[at], owner[at]
    return [chosen[owner == i] for i in range(len(episodes))]


def statistics(h: int, episodes: Sequence[np.ndarray]) -> dict[str, Any]:
    """Mean and standard errors of numbers [T] of several episodes."""
    of_all = summary(np.concatenate(episodes).tolist())
    means = [float(numbers.mean()) for numbers in episodes if len(numbers)]
    return {
        "h": h,
        "mean": of_all["mean"],
        "standard_error": of_all["standard_error"],
        "episode_error": summary(means)["standard_error"],
        "count": sum(map(len, episodes)),
    }


def diagnose(name: str, *, states: int, episodes: int, steps: int) -> dict[str, Any]:
    """Both diagnostics of one agent."""
    agent = evidence.load(name, "dynamics", "value")
    model_config = agent.config.model
    decisions = max(steps, -(-states // episodes))
    values, errors = drive(agent, evaluation_jobs(episodes), decisions)
    by_h = zip(*[drifts(episode[:steps]) for episode in values], strict=True)
    errors = spread_over(errors, states)
    return {
        "agent": name,
        "dynamics": model_config.dynamics,
        "diffusion_steps": agent.config.planner.diffusion_steps,
        "episodes": episodes,
        "steps": steps,
        "states": sum(map(len, errors)),
        "td": [statistics(h, [e[:, h] for e in errors]) for h in range(model_config.horizon)],
        "drift": [statistics(h, list(numbers)) for h, numbers in enumerate(by_h, 1)],
    }


def larger_error(cell: dict[str, Any]) -> float | None:
    """The larger error of those over states and over episodes, whose states hang together."""
    errors = [cell.get(name) for name in ("standard_error", "episode_error")]
    return max((error for error in errors if error is not None), default=None)


def table(rows: Sequence[dict[str, Any]], kind: str) -> str:
    """Markdown: a row an agent, then the paper's, a column each h."""
    columns = max(rows, key=lambda row: len(row[kind]))[kind]
    title = {"td": "TD error, h =", "drift": "drift, h ="}[kind]
    lines = [
        [Path(row["agent"]).name]
        + [evidence.plus_minus(cell["mean"], larger_error(cell), 2) for cell in row[kind]]
        for row in rows
    ]
    for name, numbers in PAPER[kind].items():
        lines.append([name, *[f"{number:.2f}" for number in numbers]])
    return evidence.markdown([title, *[str(cell["h"]) for cell in columns]], lines)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("agents", nargs="+", metavar="AGENT")
    parser.add_argument("--states", type=int, default=10_000, help="for the TD error")
    parser.add_argument("--episodes", type=int, default=100, help="the first of the fixed ones")
    parser.add_argument(
        "--steps", type=int, default=200, help="world-model steps of an episode, for the drift"
    )
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--quick", action="store_true", help="a trial: 30 steps, 8 states")
    arguments = evidence.parse(parser, argv, {"states": 8, "episodes": 1, "steps": 30})
    rows = []
    for name in arguments.agents:
        amounts = {key: getattr(arguments, key) for key in ("states", "episodes", "steps")}
        rows.append(diagnose(name, **amounts))
        if arguments.json:
            evidence.write(arguments.json, rows, [__file__, *argv])
    print(table(rows, "td"), table(rows, "drift"), sep="\n\n")


if __name__ == "__main__":
    cli.run(main)
