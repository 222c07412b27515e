"""How well scores of action sequences predict what came, against diffusion steps and futures.

python experiments/score_quality.py carracing --data RUN RUN --json quality.json

The segments of the RUNs' replay buffers, which need not be the agent's own, are encoded by the
agent. A segment's outcome is the discounted reward of its H chunks and the value of the latent
after them; its score is what a planner gives to its actions. Both are taken less the value of the
first latent, so that they say what the actions are worth. Printed are, with standard errors over
batches of segments,

    error          standard deviation of score minus outcome, in rewards
    correlation    of score and outcome

for scores of one future, and of the mean over more, which start from draws and their negatives as
those of `--planner.futures` do. "No noise" starts from zeros.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evidence
import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from valdi_jax import Agent, cli, compilation, model
from valdi_jax.config import Config, validate
from valdi_jax.data.replay import Replay
from valdi_jax.dynamics import DYNAMICS
from valdi_jax.errors import UsageError
from valdi_jax.evaluate import summary
from valdi_jax.losses.reward import chunk_rewards
from valdi_jax.planners import draw_futures
from valdi_jax.planners.scoring import predicted_return
from valdi_jax.types import Array, Batch, Params

FUTURES = (1, 2, 4, 8)
WAYS = ("no noise", *(f"{count} futures" if count > 1 else "1 future" for count in FUTURES))


def outcomes(params: Params, batch: Batch, *, config: Config) -> Array:
    """Discounted reward [B] of the first H chunks, and the value after them, if any."""
    discount, horizon = config.learn.discount, config.model.horizon
    rewards = config.learn.reward_scale * jnp.asarray(batch.rewards)[:, :horizon]
    ends = jnp.asarray(batch.observations.vector)[:, horizon]
    faded = discount ** (config.model.chunk * jnp.arange(horizon + 1.0))
    goes_on = 1 - jnp.asarray(batch.terminals)[:, :horizon].max(axis=1)
    if config.learn.bootstrap_terminal:
        goes_on = jnp.ones_like(goes_on)
    last = goes_on * faded[-1] * model.value(params, ends, config=config)
    return chunk_rewards(rewards, discount=discount) @ faded[:-1] + last


@functools.partial(jax.jit, static_argnames=("config", "steps"))
def scores(
    params: Params, z: Array, actions: Array, key: Array, *, config: Config, steps: int
) -> Array:
    """Scores [1 + F, B] of actions [B, H, C * A] from z [B, D]: without noise, then F draws."""
    shape = config.model.horizon, config.model.latent_dim
    noise = draw_futures(key, len(z), FUTURES[-1], shape).reshape(len(z), -1, *shape)
    starts = jnp.concatenate([jnp.zeros_like(noise[:, :1]), noise], axis=1)
    one = functools.partial(predicted_return, params, z, actions, config=config, steps=steps)
    return jax.lax.map(one, jnp.moveaxis(starts, 1, 0))


def measure(agent: Agent, replay: Replay, steps: int, batches: int) -> dict[str, Any]:
    """Error and correlation of each way to score, means over batches with standard errors."""
    config, params = agent.config, agent.params
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    rng = np.random.default_rng(0)
    for number in range(batches):
        batch = replay.gather(replay.draw(rng, config.learn.batch_size))
        z, _, actions = evidence.segments(batch, config)
        known = np.asarray(model.value(params, z, config=config))
        key = jax.random.fold_in(jax.random.key(0), number)
        drawn = scores(params, z, actions, key, config=config.graph, steps=steps)
        came = np.asarray(outcomes(params, batch, config=config)) - known
        worth = np.asarray(drawn) - known
        means = [worth[0], *(worth[1 : count + 1].mean(axis=0) for count in FUTURES)]
        for way, mean in zip(WAYS, means, strict=True):
            error = float((mean - came).std()) / config.learn.reward_scale
            correlation = float(np.corrcoef(mean, came)[0, 1])
            found[way].append({"error": error, "correlation": correlation})
    return {
        way: {name: summary([one[name] for one in each]) for name in each[0]}
        for way, each in found.items()
    }


def main(argv: Sequence[str]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("agent", metavar="AGENT")
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="RUN")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    compilation.cache_compilations()
    agent = evidence.load(arguments.agent, "dynamics", "reward", "value")
    if DYNAMICS[agent.config.model.dynamics].step is not None:
        raise UsageError(f"{arguments.agent} has no diffusion steps")
    if arguments.batches < 1 or arguments.batch_size < 2:
        raise UsageError("--batches must be above 0 and --batch-size above 1")
    for steps in arguments.steps:
        validate(agent.config.replace(planner={"diffusion_steps": steps}))
    agent.config = agent.config.replace(learn={"batch_size": arguments.batch_size})
    replay = evidence.encoded(agent, arguments.data, lambda numbers: track(numbers, transient=True))
    rows = [
        {"agent": arguments.agent, "steps": steps, "batches": arguments.batches}
        | measure(agent, replay, steps, arguments.batches)
        for steps in arguments.steps
    ]
    if arguments.json:
        evidence.write(arguments.json, rows, [__file__, *argv])
    for name, digits in (("error", 1), ("correlation", 3)):
        lines = []
        for row in rows:
            numbers = [row[way][name] for way in WAYS]
            cells = [evidence.plus_minus(x["mean"], x["standard_error"], digits) for x in numbers]
            lines.append([str(row["steps"]), *cells])
        print("\n" + evidence.markdown([f"{name}: steps", *WAYS], lines))


if __name__ == "__main__":
    cli.run(main)
