"""What the scripts share: the states that they look at, and results that say what made them."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import valdi_jax
from valdi_jax import Agent, model
from valdi_jax.config import Config, to_dict
from valdi_jax.data.episode import Episode
from valdi_jax.data.replay import Replay
from valdi_jax.envs import interface_of
from valdi_jax.errors import UsageError
from valdi_jax.evaluate import evaluate
from valdi_jax.observation import Observation
from valdi_jax.run import checkpoint, npz, rundir
from valdi_jax.run.manifest import content_digest, write_json
from valdi_jax.types import Array, Batch, Plan

HERE = Path(__file__).parent
ENCODED = 64  # observations per pass of the encoder


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str], quick: Mapping[str, Any]
) -> argparse.Namespace:
    """Parse a command line with ``--quick``, which changes defaults: options given overrule it."""
    arguments = parser.parse_args(argv)
    if arguments.quick:
        parser.set_defaults(**quick)
        arguments = parser.parse_args(argv)
    return arguments


class States(NamedTuple):
    """States spread over an agent's first fixed episode, and its plans there."""

    episode: Episode
    decisions: list[int]  # which of its states
    z: Array  # [P, D]
    plans: Plan  # [P, ...]
    chunks: Array  # [P, H, C * A], the plans' actions


def states(agent: Agent, count: int) -> States:
    """Drive the episode, and plan anew at so many of its states."""
    (driven,) = evaluate(agent.params, agent.config, episodes=1, keep_observations=True)
    at = np.linspace(0, len(driven.plan_seconds) - 1, count).round().astype(int)
    observations = jax.tree.map(lambda x: x[at], driven.episode.observations)
    z = model.encode(agent.params, observations, config=agent.config)
    plans = agent.plan(observations)
    chunks = plans.actions.reshape(count, agent.config.model.horizon, -1)
    return States(driven.episode, at.tolist(), z, plans, chunks)


def load(name: str, *parts: str) -> Agent:
    """Load an agent that has these networks.

    Raises:
        UsageError: if it has not all of them, or is none.
    """
    agent = Agent.load(name)
    missing = [part for part in parts if part not in agent.params]
    if missing:
        raise UsageError(f"{name} has no {' and no '.join(missing)} network")
    return agent


def encoded(
    agent: Agent, runs: Sequence[Path], each: Callable[[Sequence[int]], Iterable[int]]
) -> Replay:
    """The runs' replay buffers as one, with the agent's latents in place of observations.

    Raises:
        UsageError: if there is no such run, or its episodes do not fit the agent.
    """
    example = interface_of(agent.make_env).example

    @jax.jit
    def encode(observations: Observation) -> Array:
        one = functools.partial(model.encode, agent.params, config=agent.config.graph)
        return jax.lax.map(one, observations, batch_size=ENCODED)

    replay = Replay(agent.config)
    for run in runs:
        config = rundir.load_config(run)
        if _kind(config) != _kind(agent.config):
            raise UsageError(f"{run} holds no episodes of {agent.config.env.name} as the agent has")
        newest = rundir.latest(run)
        if damage := checkpoint.verify(newest):
            raise UsageError(damage[0])
        for number in each(list(checkpoint.replay_digests(newest))):
            episode = npz.load_episode(run, number, example, agent.config)
            latents = np.asarray(encode(episode.observations))
            seen = Observation(vector=latents)
            replay.give(dataclasses.replace(episode, observations=seen))  # however many
    if not replay.ready:
        raise UsageError(f"{' and '.join(map(str, runs))} hold no episode of a segment's length")
    return replay


def _kind(config: Config) -> tuple[Any, ...]:
    env = config.env
    return env.name, env.action_repeat, config.model.chunk, config.frame_stride


def identity(agent: Agent) -> str:
    """Digest of an agent's parameters and of how it plans and is evaluated."""
    config = to_dict(agent.config)
    settings = json.dumps({name: config[name] for name in ("env", "planner")}, sort_keys=True)
    return content_digest({"params": agent.params, "settings": settings})[:16]


def segments(batch: Batch, config: Config) -> tuple[Array, Array, Array]:
    """First latents [B, D], those after the next H chunks [B, H, D], and these [B, H, C * A]."""
    horizon, latents = config.model.horizon, jnp.asarray(batch.observations.vector)
    return latents[:, 0], latents[:, 1 : horizon + 1], jnp.asarray(batch.actions)[:, :horizon]


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    head, *lines = [f"| {' | '.join(cells)} |" for cells in (titles, *rows)]
    return "\n".join([head, "|---" * len(titles) + "|", *lines])


def plus_minus(mean: float, error: float | None, digits: int) -> str:
    """A number with its standard error, if it has one."""
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def write(path: Path, rows: Sequence[dict[str, Any]], arguments: Sequence[str]) -> None:
    """Write rows with what is needed to make them again, atomically; ``arguments``: sys.argv."""
    packages = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    about = {
        "command": shlex.join(["python", f"experiments/{Path(arguments[0]).name}", *arguments[1:]]),
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            **packages,
            "valdi_jax": valdi_jax.__version__,
        },
        "cpu": len(os.sched_getaffinity(0)),
        "device": jax.devices()[0].device_kind,
    }
    write_json(path, about | {"rows": list(rows)})


def _commit() -> str | None:
    """Short hash of the commit; none outside a repository."""
    command = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
