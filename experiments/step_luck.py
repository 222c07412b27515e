"""How much of a candidate's score is the luck of its noise draw, against diffusion steps.

python experiments/step_luck.py carracing --steps 1 2 4 8 --json luck.json

At states of the first episode, two populations of candidates as CEM sees them: first from the
standard normal, last from the mean and standard deviation of the agent's plan there. They are
scored under draws of their own and under shared ones, the same for every number of steps. Printed
are means and standard errors over states, in rewards:

    luck        standard deviation of one candidate's score over draws
    merit       standard deviation between candidates' mean scores, without the noise of these
    share       luck's share of the variance between scores: luck^2 / (luck^2 + merit^2)
    left        luck that is left where candidates share a draw: what it does not add to all alike

and of the candidate that wins by a score of one draw, or by the mean over several futures, which
start from draws and their negatives as those of `--planner.futures` do:

    top         how often it is among the best tenth by its mean score
    optimism    its score minus its mean score
    regret      the best candidate's mean score minus its own

Mean scores are over further draws: half of them find the best, half say what each is worth.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import evidence
import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax import Agent, cli
from valdi_jax.config import Config, validate
from valdi_jax.dynamics import DYNAMICS
from valdi_jax.errors import UsageError
from valdi_jax.evaluate import summary
from valdi_jax.planners.base import correlated_normal, hold
from valdi_jax.planners.scoring import predicted_return
from valdi_jax.types import Array, Params

FUTURES = (1, 2, 4)  # whose mean is a score


def way(kind: str, futures: int) -> str:
    """Name of a way to score."""
    return kind + (f", {futures} futures" if futures > 1 else "")


WAYS = tuple(way(kind, count) for count in FUTURES for kind in ("own", "shared"))
QUICK: dict[str, Any] = {"steps": [1, 2], "states": 2, "candidates": 16, "draws": 8}


def spreads(own: np.ndarray, shared: np.ndarray) -> dict[str, float]:
    """Luck, merit, share and left of scores [N, M] under own and under shared draws."""
    luck = own.var(axis=1, ddof=1).mean()
    merit = max(own.mean(axis=1).var(ddof=1) - luck / own.shape[1], 0.0)
    rest = shared - shared.mean(axis=0) - shared.mean(axis=1, keepdims=True) + shared.mean()
    left = (rest**2).sum() / ((shared.shape[0] - 1) * (shared.shape[1] - 1))
    share = luck / (luck + merit) if luck else 0.0
    return {"luck": luck**0.5, "merit": merit**0.5, "share": share, "left": left**0.5}


def choices(scores: np.ndarray, further: np.ndarray) -> dict[str, float]:
    """Top, optimism and regret of the winners of scores [N, M], by further scores [N, any]."""
    rank, worth = (half.mean(axis=1) for half in np.array_split(further, 2, axis=1))
    winners, best = scores.argmax(axis=0), rank.argsort()[::-1]
    return {
        "top": np.isin(winners, best[: -(-len(best) // 10)]).mean(),
        "optimism": (scores.max(axis=0) - worth[winners]).mean(),
        "regret": (worth[best[0]] - worth[winners]).mean(),
    }


def populations(agent: Agent, states: int, candidates: int) -> tuple[Array, dict[str, Array]]:
    """Latents [P, D] spread over the first episode, and actions [P, N, H, C * A] there."""
    found, config = evidence.states(agent, states), agent.config
    shape = (states, candidates, *config.search_shape)
    noise = correlated_normal(jax.random.key(1), shape, correlation=config.planner.correlation)
    noise = hold(noise, config.planner.action_hold)
    drawn = {"first": noise, "last": found.plans.mean[:, None] + found.plans.std[:, None] * noise}
    shape = (states, candidates, config.model.horizon, -1)
    chunks = {name: jnp.tanh(x).reshape(shape) for name, x in drawn.items()}
    return found.z, chunks


class Draws(NamedTuple):
    """Noise draws [M] that candidates are scored under."""

    keys: Array
    shared: Array  # whether all candidates have the same
    sign: Array  # 1, or -1 for the negative


@functools.partial(jax.jit, static_argnames=("config",))
def score(params: Params, z: Array, chunks: Array, draws: Draws, *, config: Config) -> Array:
    """Scores [N, M] of candidates [N, H, C * A] from z [D]."""
    shape = chunks.shape[0], config.model.horizon, config.model.latent_dim

    def of_draw(draw: Draws) -> Array:
        noise = draw.sign * jax.random.normal(draw.keys, shape)
        noise = jnp.where(draw.shared, noise[:1], noise)
        return predicted_return(params, z, chunks, noise, config=config, steps=steps)

    steps = config.planner.diffusion_steps
    return jax.lax.map(of_draw, draws).T / config.learn.reward_scale


def make_draws(key: Array, count: int) -> Draws:
    """Own draws, shared ones, the negatives of both, and further shared ones: [5 * count]."""
    keys = jax.random.split(key, 3 * count)
    both, further = keys[: 2 * count], keys[2 * count :]
    kind = jnp.repeat(jnp.arange(5), count)
    return Draws(
        keys=jnp.concatenate([both, both, further]),
        shared=(kind != 0) & (kind != 2),
        sign=jnp.where(kind // 2 == 1, -1.0, 1.0),
    )


def measure(agent: Agent, steps: int, z: Array, chunks: Array, draws: int) -> dict[str, Any]:
    """Means over states z [P, D] and their candidates [P, N, H, C * A], with standard errors."""
    config = agent.config.replace(planner={"diffusion_steps": steps}).graph
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("spreads", *WAYS)}
    for index in range(len(z)):
        drawn = make_draws(jax.random.fold_in(jax.random.key(2), index), draws)
        scores = np.asarray(
            score(agent.params, z[index], chunks[index], drawn, config=config), np.float64
        )
        own, shared, own_negative, shared_negative, further = np.split(scores, 5, axis=1)
        found["spreads"].append(spreads(own, shared))
        for futures in FUTURES:
            for name, plus, minus in (
                ("own", own, own_negative),
                ("shared", shared, shared_negative),
            ):
                means = plus
                if futures > 1:
                    pairs = (plus + minus) / 2
                    means = pairs.reshape(len(pairs), -1, futures // 2).mean(axis=2)
                found[way(name, futures)].append(choices(means, further))
    return {
        group: {name: summary([numbers[name] for numbers in each]) for name in each[0]}
        for group, each in found.items()
    }


def table(rows: list[dict[str, Any]], columns: list[tuple[str, str, str]]) -> str:
    """Markdown: a row an agent, population and number of steps; columns (title, group, name)."""
    titles = ["agent", "candidates", "steps", *(title for title, _, _ in columns)]
    lines = []
    for r in rows:
        numbers = [r[group][name] for _, group, name in columns]
        cells = [evidence.plus_minus(x["mean"], x["standard_error"], 2) for x in numbers]
        lines.append([Path(r["agent"]).name, r["population"], str(r["steps"]), *cells])
    return evidence.markdown(titles, lines)


def main(argv: Sequence[str]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("agents", nargs="+", metavar="AGENT")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--draws", type=int, default=48, help="an even number")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a trial")
    arguments = evidence.parse(parser, argv, QUICK)
    if arguments.draws < 2 or arguments.draws % 2:
        raise UsageError(f"--draws is {arguments.draws}; it must be even, and 2 or more")
    for name, least in (("states", 1), ("candidates", 2)):
        if getattr(arguments, name) < least:
            raise UsageError(f"--{name} is {getattr(arguments, name)}; it must be {least} or more")
    counts = {name: getattr(arguments, name) for name in ("states", "candidates", "draws")}
    rows = []
    for name in arguments.agents:
        agent = Agent.load(name)
        sizes, kind = agent.config.model, agent.config.planner.kind
        if DYNAMICS[sizes.dynamics].step or "q" in sizes.networks or kind != "cem":
            raise UsageError(f"{name} is no agent with diffusion steps, a value head and CEM")
        for steps in arguments.steps:
            validate(agent.config.replace(planner={"diffusion_steps": steps}))
        z, both = populations(agent, arguments.states, arguments.candidates)
        for population, chunks in both.items():
            for steps in arguments.steps:
                settings = {"agent": name, "population": population, "steps": steps} | counts
                rows.append(settings | measure(agent, steps, z, chunks, arguments.draws))
    if arguments.json:
        evidence.write(arguments.json, rows, [__file__, *argv])
    print(table(rows, [(name, "spreads", name) for name in ("luck", "merit", "share", "left")]))
    for choice in ("top", "optimism", "regret"):
        print("\n" + table(rows, [(f"{choice}: {way}", way, choice) for way in WAYS]))


if __name__ == "__main__":
    cli.run(main)
