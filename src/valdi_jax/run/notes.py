"""What a user should know before a run begins."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from valdi_jax.data.episode import Episode
from valdi_jax.data.rollout import first_carries, plan_batch
from valdi_jax.data.source import Source
from valdi_jax.data.store import store_shapes
from valdi_jax.planners import PLANNERS
from valdi_jax.run.learner import Learner
from valdi_jax.run.processes import Processes

_COSTLY = 2000  # passes of the networks for a plan, from which it is timed on a CPU


def notes(
    source: Source, learner: Learner, processes: Processes, recorded: Sequence[Episode]
) -> Iterator[str]:
    """Sentences on a run that is about to begin; planning is timed where it may be slow."""
    yield from _on_length(source, recorded)
    yield from _on_devices(source, learner, processes)
    yield from _on_actors(source)
    yield from _on_cost(source, learner)
    yield from _on_memory(source)


def _on_length(source: Source, recorded: Sequence[Episode]) -> Iterator[str]:
    total, seeds = source.config.collect.episodes, source.config.collect.seed_episodes
    if total <= seeds and not recorded:
        yield f"note: {total} episodes end before the first update, after {seeds}"


def _on_devices(source: Source, learner: Learner, processes: Processes) -> Iterator[str]:
    if jax.device_count() == 1:
        return
    config = source.config
    samples = PLANNERS[config.planner.kind].plan is not None
    alone = config.collect.lag or config.collect.cluster or samples
    planning = 1 if alone else jax.local_device_count()
    shared = f" of {processes.count} processes" if processes.several else ""
    yield f"planning on {planning} devices, learning on {learner.devices}{shared}"


def _on_actors(source: Source) -> Iterator[str]:
    """Whether rounds are too small for the actors."""
    collect = source.config.collect
    parts = -(-len(source.next_round(0)) // collect.num_envs) * max(1, collect.lag)
    if parts < collect.actors:
        yield (
            f"note: {parts} of {collect.actors} actors will have work: "
            "--collect.episodes-per-round or --collect.lag gives more"
        )


def _on_cost(source: Source, learner: Learner) -> Iterator[str]:
    """The time of a decision, if it is high on this CPU."""
    config = source.config
    passes = PLANNERS[config.planner.kind].passes(config)
    if config.planner.candidates * passes < _COSTLY or jax.default_backend() != "cpu":
        return
    size = -(-config.collect.num_envs // (2 if config.collect.lag else 1))  # as in a rollout
    seconds = 0.0
    for _ in range(2):  # the first call compiles
        start = time.perf_counter()
        with learner.planning() as params:
            plan = plan_batch(
                params,
                jax.tree.map(lambda x: np.stack([x] * size), source.example),
                jax.random.split(jax.random.key(0), size),
                np.zeros(size, np.int32),
                np.float32(0),
                first_carries(size, config),
                config=config.graph,
            )
            jax.block_until_ready(plan)
        seconds = time.perf_counter() - start
    sized = config.env.name == "carracing" and not config.diffuses_plans
    remedy = "--preset cpu is sized for it" if sized else "fewer --planner.candidates cost less"
    yield f"note: a decision costs {seconds:.1f} s on this CPU; {remedy}"


def _on_memory(source: Source) -> Iterator[str]:
    """Whether a full replay does not fit into the memory that there is."""
    config = source.config
    if not config.episode_steps:
        return
    shapes = jax.tree.leaves(store_shapes(source.example, config))
    needed = sum(x.size * x.dtype.itemsize for x in shapes) / 1e9
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    if needed > 0.8 * memory:
        yield (
            f"warning: a full replay takes {needed:.0f} GB, and this machine has {memory:.0f}: a "
            "smaller --replay.capacity or --env.render-every chunk takes less"
        )
