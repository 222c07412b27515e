"""Behaviour cloning of a recorded dataset, the least that learning from it must beat.

python experiments/cloning.py minari:pendulum/mixed-v0 --seeds 0 1 2 --json cloning.json

An MLP learns the recorded actions by squared error, and drives the fixed episodes of the dataset's
environment (--env, where the dataset names none). Vector observations only. The table has the
returns in the data, and of each clone.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import evidence
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

from valdi_jax import cli, compilation
from valdi_jax.data.episode import Episode
from valdi_jax.data.recorded import environment_of, read_recorded
from valdi_jax.envs import evaluation_seeds, interface_of, make_env, own_env
from valdi_jax.envs.spaces import Interface
from valdi_jax.errors import UsageError
from valdi_jax.evaluate import summary
from valdi_jax.presets import default_config
from valdi_jax.run.manifest import check_writable

WIDTH, BATCH, LEARNING_RATE = 256, 256, 3e-4
PER_CALL = 500  # updates in a compiled call

Act = Callable[[np.ndarray], np.ndarray]


def clone(episodes: Sequence[Episode], updates: int, seed: int) -> Act:
    """Train an MLP on the episodes' actions: from an observation's vector [D] to an action [A]."""
    vectors = [episode.observations.vector for episode in episodes]
    inputs = jnp.asarray(np.concatenate([vector[:-1] for vector in vectors]))  # the last has none
    targets = jnp.asarray(np.concatenate([episode.actions for episode in episodes]))
    mean, deviation = inputs.mean(0, keepdims=True), inputs.std(0, keepdims=True) + 1e-6
    size = targets.shape[1]
    layers: list[Callable[..., Any]] = [nn.Dense(WIDTH), nn.relu, nn.Dense(WIDTH), nn.relu]
    net = nn.Sequential([*layers, nn.Dense(size), jnp.tanh])
    optimizer = optax.adam(LEARNING_RATE)

    def predict(params: Any, vectors: jax.Array) -> jax.Array:
        return jnp.asarray(net.apply(params, (vectors - mean) / deviation))

    def step(state: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], None]:
        params, moments = state
        rows = jax.random.randint(key, (BATCH,), 0, len(inputs))

        def loss(params: Any) -> jax.Array:
            return jnp.mean((predict(params, inputs[rows]) - targets[rows]) ** 2)

        changes, moments = optimizer.update(jax.grad(loss)(params), moments)
        return (optax.apply_updates(params, changes), moments), None

    @jax.jit
    def learn(state: tuple[Any, Any], keys: jax.Array) -> tuple[Any, Any]:
        return jax.lax.scan(step, state, keys)[0]

    first, rest = jax.random.split(jax.random.key(seed))
    keys = jax.random.split(rest, updates)
    params = net.init(first, inputs[:1])
    state = params, optimizer.init(params)
    for start in range(0, updates, PER_CALL):
        state = learn(state, keys[start : start + PER_CALL])
    act = jax.jit(predict)
    return lambda vector: np.asarray(act(state[0], vector[None]))[0]


def drive(env: Any, interface: Interface, act: Act, seed: int) -> float:
    """The return of one episode."""
    observation, _ = env.reset(seed=seed)
    total, over = 0.0, False
    while not over:
        action = interface.act(act(interface.observe(observation).vector))
        observation, reward, terminated, truncated, _ = env.step(action)
        total, over = total + float(reward), terminated or truncated
    return total


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="minari:ID")
    parser.add_argument("--env", metavar="NAME", help="by default the one that the data names")
    parser.add_argument("--episodes", type=int, default=20, help="fixed ones that are driven")
    parser.add_argument("--updates", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    arguments = parser.parse_args(argv)
    if arguments.updates < 1:
        raise UsageError(f"--updates is {arguments.updates}; it must be above 0")
    if arguments.json:
        check_writable(arguments.json)
    seeds = evaluation_seeds(arguments.episodes)
    env = environment_of(arguments.data, arguments.env)
    if not env:
        raise UsageError(f"{arguments.data} names no environment: give --env")
    compilation.cache_compilations()
    config = default_config(env["name"], None).replace(env=env)
    interface = interface_of(functools.partial(make_env, config.env, training=False))
    if interface.example.image is not None:
        raise UsageError(f"{config.env.name} observes images: only vectors are cloned here")
    episodes = read_recorded(arguments.data, interface, config)
    rows = [{"agent": arguments.data, "returns": [each.episode_return for each in episodes]}]
    env = own_env(make_env, config.env, training=False)
    try:
        for seed in arguments.seeds:
            act = clone(episodes, arguments.updates, seed)
            driven = track(seeds, description=f"seed {seed}", transient=True)
            returns = [drive(env, interface, act, int(number)) for number in driven]
            rows.append({"agent": "clone", "seed": seed, "returns": returns})
    finally:
        env.close()
    for row in rows:
        row |= {"episodes": len(row["returns"])} | summary(row["returns"])
    print(
        evidence.markdown(
            ["", "seed", "episodes", "return", "median"],
            [
                [
                    str(row["agent"]),
                    str(row.get("seed", "")),
                    str(row["episodes"]),
                    evidence.plus_minus(row["mean"], row["standard_error"], 0),
                    f"{row['median']:.0f}",
                ]
                for row in rows
            ],
        )
    )
    if arguments.json:
        evidence.write(arguments.json, rows, sys.argv)


if __name__ == "__main__":
    cli.run(main)
