"""What the energy does to plans (MBDPO's Figures 21, 22): drift, TD error, return against eta.

python experiments/anchor.py RUN --eta 0 0.01 0.1 1 --episodes 10

RUN is an agent with a policy prior, an energy and a value. Drift is the mean distance of planned
actions from the prior's mean; the TD error is |r + gamma^C V(z') - V(z)| of the chunks driven.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import evidence
import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax import Agent, cli, model
from valdi_jax.evaluate import evaluate, summary
from valdi_jax.losses.reward import chunk_rewards


@functools.partial(jax.jit, static_argnames=("config",))
def measure(params, observations, actions, rewards, alive, key, *, config) -> dict:
    """Means over the decisions of an episode: T + 1 observations, T chunks [T, C * A], [T, C].

    ``alive`` [T] is 0 where the episode terminates, so that nothing is worth anything after.
    """
    z = model.encode(params, observations, config=config)
    noise = jnp.zeros_like(actions)
    prior = jnp.tanh(model.policy(params, z[:-1], noise, config=config).mean)
    random = jax.random.uniform(key, actions.shape, minval=-1, maxval=1)
    value = functools.partial(model.value, params, config=config)
    reward = chunk_rewards(config.learn.reward_scale * rewards, discount=config.learn.discount)
    target = reward + config.learn.discount**config.model.chunk * alive * value(z[1:])
    bonus = functools.partial(model.energy_bonus, params, z[:-1], config=config)
    return {
        "drift": jnp.abs(actions - prior).mean(),
        "td_error": jnp.abs(target - value(z[:-1])).mean(),
        "planned": bonus(actions).mean(),
        "prior": bonus(prior).mean(),
        "random": bonus(random).mean(),
    }


def with_eta(agent: Agent, eta: float, episodes: int) -> dict:
    """Drive with a weight of the energy, and average what was measured."""
    planner = dataclasses.replace(agent.config.planner, eta=eta)
    agent.config = dataclasses.replace(agent.config, planner=planner)
    chunk = agent.config.model.chunk
    measured, returns = [], []
    for rollout in evaluate(agent.params, agent.config, episodes=episodes, keep_observations=True):
        episode = rollout.episode
        count = len(episode.rewards) // chunk
        over = count * chunk == len(episode.rewards)
        values = measure(
            agent.params,
            jax.tree.map(lambda x, n=count: x[: n + 1], episode.observations),
            jnp.asarray(episode.actions[: count * chunk].reshape(count, -1)),
            jnp.asarray(episode.rewards[: count * chunk].reshape(count, chunk)),
            jnp.ones(count).at[-1].set(float(not (over and episode.terminated))),
            jax.random.key(len(returns)),
            config=agent.config.graph,
        )
        measured.append({name: float(value) for name, value in values.items()})
        returns.append(episode.episode_return)
    numbers = {name: float(np.mean([m[name] for m in measured])) for name in measured[0]}
    return {"eta": eta, **summary(returns), **numbers}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("agent")
    parser.add_argument("--eta", type=float, nargs="+", default=[0.0, 0.01, 0.1, 1.0])
    parser.add_argument("--episodes", type=int, default=10, help="at least 2")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.episodes < 2:
        parser.error("--episodes has to be at least 2, or there is no standard error")
    agent = evidence.load(arguments.agent, "policy", "energy", "value")
    rows = [with_eta(agent, eta, arguments.episodes) for eta in arguments.eta]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    print("| eta | return | drift | TD error | energy: planned | prior | random |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        score = f"{r['mean']:.0f} ± {r['standard_error']:.0f}"
        rest = ("drift", "td_error", "planned", "prior", "random")
        print(f"| {r['eta']:g} | {score} | " + " | ".join(f"{r[x]:.3f}" for x in rest) + " |")


if __name__ == "__main__":
    cli.run(main)
