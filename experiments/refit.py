"""Fit a trained diffusion agent to samples of several steps, with its encoder frozen.

python experiments/refit.py carracing --data RUN RUN --shortcut 8000 --heads 8000 --out DIR

The replay buffers of the RUNs, which need not be the agent's own, are encoded once. From these
latents,

    --shortcut N   the world model learns, in N updates, to arrive in 1, 2, 4, 8 or 16 steps where
                   it arrives in 32 (shortcut models, Frans et al., 2024)
    --heads N      then the reward and value heads learn, in N updates, from latents sampled in
                   --steps steps, or with 0 from one-step estimates at all timesteps, as in training

A shortcut's network is told how far a step goes: each number of steps has an embedding of each
timestep. An exported agent has one table of them, so DIR gets an agent for each number of steps,
1, 2, 4 and 8. Without --shortcut they differ in this setting alone. Printed are the distances of
their samples from those of the given agent in 32 steps, from the same noise.
"""

from __future__ import annotations

import argparse
import functools
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import evidence
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import Progress

from valdi_jax import cli, compilation, diffusion, losses, model
from valdi_jax.config import Config
from valdi_jax.data.replay import Replay
from valdi_jax.dynamics import DYNAMICS
from valdi_jax.dynamics.base import masked_mean
from valdi_jax.errors import UsageError
from valdi_jax.losses import reward, value
from valdi_jax.networks.layers import apply
from valdi_jax.networks.transformer import DiffusionTransformer
from valdi_jax.run import agents
from valdi_jax.types import Array, Batch, Params
from valdi_jax.updates import make_optimizer

HEADS = ("reward", "value")
STEPS = (1, 2, 4, 8)  # of the exported agents
FINEST = 5  # level L has 2^L steps; the finest is the given agent's
TABLE = "timestep_embedding"
SLOW = 0.01  # rate of the average from which a student's targets come


def at_level(dynamics: Params, level: int, timesteps: int) -> Params:
    """The world model of a shortcut's level: its own table of embeddings."""
    table = dynamics[TABLE][level * timesteps : (level + 1) * timesteps]
    return dynamics | {TABLE: table}


def shortcut_loss(
    params: Params, slow: Params, teacher: Params, batch: Batch, key: Array, *, config: Config
) -> Array:
    """Squared error [] of velocities: half of the batch of the finest level, half of others.

    At the finest level the target is the teacher's velocity. At any other it is the velocity that
    arrives where two steps of the next level do. DDIM moves a sample by an angle,
    x' = cos(d) x + sin(d) v, where the cosine of a timestep's own angle is sqrt(alpha_bar).
    """
    sizes = config.model
    last = sizes.diffusion_timesteps  # stands for the clean sample
    visited = np.full((FINEST + 2, 2 ** (FINEST + 1) + 1), last)
    for level in range(FINEST + 2):
        steps = diffusion.ddim_timesteps(2**level, last)
        visited[level, : len(steps)] = steps
    alpha_bars = np.append(diffusion.alpha_bars(last), 1).astype(np.float64)
    angles = jnp.asarray(np.arccos(np.sqrt(alpha_bars)), jnp.float32)

    z, clean, actions = evidence.segments(batch, config)
    count = len(z)
    keys = jax.random.split(key, 3)
    others = jax.random.randint(keys[0], (count,), 0, FINEST)
    level = jnp.where(jnp.arange(count) < count // 2, FINEST, others)
    at = jnp.floor(jax.random.uniform(keys[1], (count,)) * 2**level).astype(jnp.int32)
    grid = jnp.asarray(visited)
    start, middle, end = grid[level, at], grid[level + 1, 2 * at + 1], grid[level, at + 1]

    def angle(timestep: Array) -> Array:
        return angles[timestep][:, None, None]

    def velocity(dynamics: Params, noised: Array, level: Array | int, timestep: Array) -> Array:
        levels = dynamics[TABLE].shape[0] // last
        index = jnp.minimum(level, levels - 1) * last + jnp.minimum(timestep, last - 1)
        net = DiffusionTransformer(sizes, levels * last)
        return apply(net, dynamics, z, actions, noised, index)

    def move(noised: Array, velocity: Array, start: Array, end: Array) -> Array:
        turn = angle(end) - angle(start)
        return jnp.cos(turn) * noised + jnp.sin(turn) * velocity

    noise = jax.random.normal(keys[2], clean.shape)
    noised = jnp.cos(angle(start)) * clean + jnp.sin(angle(start)) * noise
    half = move(noised, velocity(slow, noised, level + 1, start), start, middle)
    there = move(half, velocity(slow, half, level + 1, middle), middle, end)
    turn = angle(end) - angle(start)
    joined = (there - jnp.cos(turn) * noised) / jnp.sin(turn)
    own = velocity(teacher, noised, 0, start)
    target = jnp.where((level == FINEST)[:, None, None], own, joined)
    within = losses.before_end(losses.ends(batch, config=config))[:, : sizes.horizon]
    error = (velocity(params, noised, level, start) - jax.lax.stop_gradient(target)) ** 2
    return masked_mean(error, within[:, :, None])


def heads_loss(
    heads: Params,
    slow: Params,
    dynamics: Params,
    batch: Batch,
    key: Array,
    *,
    config: Config,
    steps: int,
) -> Array:
    """Loss [] of the reward and value heads, with the targets of training."""
    learn, world = config.learn, DYNAMICS[config.model.dynamics]
    z, targets, actions = evidence.segments(batch, config)
    keys = jax.random.split(key)
    if steps:
        noise = jax.random.normal(keys[0], targets.shape)
        imagined = model.imagine(dynamics, z, actions, noise, config=config.model, steps=steps)
    else:
        draws = world.draw(keys, len(z), config=config.model)
        within = losses.before_end(losses.ends(batch, config=config))[:, : config.model.horizon]
        given = (z, actions, targets, within, draws)
        _, imagined = world.predict(dynamics, *given, config=config.model)
    following = jnp.asarray(batch.observations.vector)[:, 1:]
    view = losses.view(batch, z, imagined, targets, following, jnp.zeros(()), config=config)
    total = jnp.zeros(())
    for term in (reward.TERM, value.TERM):
        share = (1 - learn.sigreg_weight) * term.weight(config)  # as the gradient's norm is clipped
        total += share * term.loss(heads, slow, view, None, config=config)[0]
    return total


def fit(
    loss: Callable[..., Array],
    params: Params,
    frozen: Params,
    replay: Replay,
    updates: int,
    *,
    slow_rate: float,
    config: Config,
    on_update: Callable[[], object] = lambda: None,
) -> Params:
    """Minimise a loss with the optimizer of training; returns the parameters' moving average."""
    optimizer = make_optimizer(config)

    @jax.jit
    def update(params: Params, slow: Params, state: Any, batch: Batch, key: Array) -> Any:
        gradient = jax.grad(loss)(params, slow, frozen, batch, key, config=config.graph)
        change, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, change)
        return params, optax.incremental_update(params, slow, slow_rate), state

    slow, state, rng = params, optimizer.init(params), np.random.default_rng(0)
    for number in range(updates):
        batch = replay.gather(replay.draw(rng, config.learn.batch_size))
        key = jax.random.fold_in(jax.random.key(0), number)
        params, slow, state = update(params, slow, state, batch, key)
        on_update()
    return slow


def distances(
    worlds: dict[int, Params], teacher: Params, replay: Replay, *, config: Config
) -> dict[int, float]:
    """RMS distance of samples in some steps from the teacher's in the most, from the same noise."""
    batch = replay.gather(replay.draw(np.random.default_rng(1), 256))
    z, targets, actions = evidence.segments(batch, config)
    noise = jax.random.normal(jax.random.key(1), targets.shape)
    sample = functools.partial(model.imagine, config=config.model)
    ends = sample(teacher, z, actions, noise, steps=2**FINEST)
    return {
        steps: float(
            jnp.sqrt(jnp.mean((sample(world, z, actions, noise, steps=steps) - ends) ** 2))
        )
        for steps, world in worlds.items()
    }


def main(argv: Sequence[str]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("agent", metavar="AGENT")
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="RUN")
    parser.add_argument("--shortcut", type=int, default=0, metavar="N")
    parser.add_argument("--heads", type=int, default=0, metavar="N")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args(argv)
    compilation.cache_compilations()
    agent = evidence.load(arguments.agent, "dynamics", *HEADS)
    if agent.config.model.dynamics != "diffusion":
        raise UsageError(f"{arguments.agent} has no diffusion world model")
    if arguments.out.exists():
        raise UsageError(f"{arguments.out} exists already: give a new directory")
    if agent.config.model.diffusion_timesteps < 2 ** (FINEST + 1):
        raise UsageError(f"{arguments.agent} has fewer than {2 ** (FINEST + 1)} timesteps")
    for name, least in (("shortcut", 0), ("heads", 0), ("batch_size", 1)):
        if getattr(arguments, name) < least:
            option = name.replace("_", "-")
            raise UsageError(
                f"--{option} is {getattr(arguments, name)}; it must be {least} or more"
            )
    if not arguments.shortcut and not arguments.heads:
        raise UsageError("nothing to learn: give --shortcut or --heads")
    if arguments.steps not in (0, *STEPS):
        raise UsageError(f"--steps is {arguments.steps}; it must be one of 0, 1, 2, 4, 8")
    config = agent.config.replace(learn={"batch_size": arguments.batch_size})
    params, teacher = dict(agent.params), agent.params["dynamics"]
    worlds = dict.fromkeys(STEPS, teacher)
    with Progress(transient=True) as bar:
        replay = evidence.encoded(agent, arguments.data, lambda numbers: bar.track(numbers))
        print("before:", distances(worlds, teacher, replay, config=config))
        task = bar.add_task("training", total=arguments.shortcut + arguments.heads)
        settings = {"config": config, "on_update": functools.partial(bar.advance, task)}
        if arguments.shortcut:
            levels = teacher | {TABLE: jnp.tile(teacher[TABLE], (FINEST + 1, 1))}
            given = shortcut_loss, levels, teacher, replay, arguments.shortcut
            levels = fit(*given, slow_rate=SLOW, **settings)
            timesteps = config.model.diffusion_timesteps
            worlds = {
                steps: at_level(levels, level, timesteps) for level, steps in enumerate(STEPS)
            }
            print("after:", distances(worlds, teacher, replay, config=config))
        if arguments.heads:
            loss = functools.partial(heads_loss, steps=arguments.steps)
            heads = {name: params[name] for name in HEADS}
            world = worlds.get(arguments.steps, teacher) if arguments.steps else teacher
            given = loss, heads, world, replay, arguments.heads
            params |= fit(*given, slow_rate=config.learn.ema_rate, **settings)
    command = shlex.join(["python", "experiments/refit.py", *argv])
    for steps, world in worlds.items():
        own = agent.config.replace(planner={"diffusion_steps": steps})
        directory = arguments.out / str(steps)
        agents.save(
            *(directory, params | {"dynamics": world}, own),
            half=False,
            trained={"command": command},
        )
    print(arguments.out)


if __name__ == "__main__":
    cli.run(main)
