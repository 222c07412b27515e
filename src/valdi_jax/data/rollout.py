"""Rollouts: the planner acts in environments to collect episodes."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax.config import CollectConfig, Config
from valdi_jax.data.episode import Episode
from valdi_jax.envs.workers import Pool
from valdi_jax.errors import StoppedError
from valdi_jax.observation import Observation
from valdi_jax.planners import first_carry, plan
from valdi_jax.types import Array, Params, Plan

_EPISODE_LOSSES = 5  # lost environments, after which an episode is given up


@dataclasses.dataclass(frozen=True)
class Job:
    """An episode to roll out."""

    seed: int  # of the environment's reset
    key: Array  # each decision folds its number into it


@dataclasses.dataclass
class Rollout:
    """A finished episode and its statistics."""

    episode: Episode
    predicted_return: float  # mean over the decisions
    plan_seconds: np.ndarray  # [decisions] wall time of each planner call
    env_seconds: np.ndarray  # [decisions] wall time waited for each chunk of environment steps
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # means over the decisions


@functools.partial(jax.jit, static_argnames=("config",))
def plan_batch(
    params: Params,
    observations: Observation,
    keys: Array,
    decisions: Array,
    noise_std: Array,
    carries: Any = None,
    *,
    config: Config,
) -> Plan:
    """Plan for a batch of environments in one call.

    Args:
        params: parameters of all networks.
        observations: [B, ...].
        keys: [B] keys of the episodes.
        decisions: [B] int32, the number of each decision within its episode.
        noise_std: [] exploration noise.
        carries: [B, ...] of the previous plans; ignored for an episode's first decision.

    Returns: plans [B], of whose actions only the first chunks [B, C, A].
    """

    def one(observation, key, decision, carry):
        key = jax.random.fold_in(key, decision)
        carry = jax.tree.map(
            lambda first, x: jnp.where(decision == 0, first, x), first_carry(config), carry
        )
        return plan(params, observation, key, config=config, noise_std=noise_std, carry=carry)

    plans = jax.vmap(one)(observations, keys, decisions, carries)
    return plans.replace(actions=plans.actions[:, : config.model.chunk])


def first_carries(batch: int, config: Config) -> Any:
    """Initial ``carries`` of `plan_batch` for ``batch`` environments, on the host."""
    return jax.tree.map(lambda x: np.stack([x] * batch), jax.device_get(first_carry(config)))


def exploration_noise(episode: int, config: CollectConfig) -> float:
    """Standard deviation of the exploration noise: constant, then decaying linearly.

    ``episode`` counts from the first after the seed episodes, which are negative.
    """
    if episode < 0 and config.seed_noise:
        return config.seed_noise
    after = episode - config.noise_hold
    progress = after / config.noise_decay if config.noise_decay else float(after >= 0)
    progress = min(max(progress, 0.0), 1.0)
    return config.noise_start + progress * (config.noise_end - config.noise_start)


def roll_out(
    params: Params,
    pool: Pool,
    jobs: Iterable[Job],
    *,
    config: Config,
    noise_std: float = 0.0,
    groups: int = 1,
    keep_observations: bool = True,
    on_decision: Callable[[], None] = lambda: None,
    on_rollout: Callable[[Rollout], None] = lambda rollout: None,
) -> list[Rollout]:
    """Roll out one episode per job, the planner batched over the pool's environments.

    A finished environment takes the next job. If none is left it idles while the others finish; its
    place in the planner's batch is filled anyway, so that no other batch size compiles. An episode
    whose environment is lost restarts.

    Args:
        params: parameters to plan with.
        pool: the environments.
        jobs: the episodes.
        noise_std: exploration noise.
        groups: of environments; one is planned for while the others step.
        keep_observations: whether episodes hold all observations, or only the last.
        on_decision: called before every planner call; an exception ends the rollouts.
        on_rollout: called with every finished one.

    Returns: the episodes in the order of the jobs.

    Raises:
        StoppedError: if an episode loses its environment too often.
    """
    jobs, config = list(jobs), config.graph
    waiting = list(enumerate(jobs))[::-1]
    finished: dict[int, Rollout] = {}
    losses: Counter[int] = Counter()  # lost environments of each job
    width = -(-pool.size // groups)
    parts = [part.tolist() for part in np.array_split(np.arange(pool.size), groups) if len(part)]
    under_way: list[dict[int, _Slot]] = [{} for _ in parts]
    carries = [first_carries(width, config) for _ in parts]
    while waiting or any(under_way):
        for group, (part, slots) in enumerate(zip(parts, under_way, strict=True)):
            ended, losing = _receive(pool, slots, keep_observations)
            finished |= ended
            for rollout in ended.values():
                on_rollout(rollout)
            for lost in losing:
                losses[lost.number] += 1
                if losses[lost.number] == _EPISODE_LOSSES:
                    raise StoppedError(
                        f"the episode with the seed {lost.job.seed} lost its environment "
                        f"{_EPISODE_LOSSES} times: the worker died or did not answer"
                    )
                waiting.append((lost.number, lost.job))
            free = [index for index in part if index not in slots]
            starting = {index: waiting.pop() for index in free if waiting}
            firsts = pool.reset({index: job.seed for index, (_, job) in starting.items()})
            for index, (number, job) in starting.items():
                if index in firsts:
                    slots[index] = _Slot(number, job, [firsts[index]])
                else:
                    waiting.append((number, job))
            if not slots:
                continue

            on_decision()
            start = time.perf_counter()
            idle = next(iter(slots))
            places = part + [idle] * (width - len(part))
            batch = [slots.get(index, slots[idle]) for index in places]
            plans = plan_batch(
                params,
                jax.tree.map(lambda *x: np.stack(x), *[slot.observations[-1] for slot in batch]),
                jnp.stack([slot.job.key for slot in batch]),
                np.array([slot.decisions for slot in batch], np.int32),
                np.float32(noise_std),
                carries[group],
                config=config,
            )
            # To the host: a carry with the parameters' sharding would recompile the call.
            plans = jax.device_get(plans.replace(mean=None, std=None))
            carries[group] = plans.carry
            planned = time.perf_counter()
            chosen = {index: plans.actions[part.index(index)] for index in slots}
            pool.send(chosen)
            sent = time.perf_counter()
            for index, slot in slots.items():
                slot.chunk = chosen[index]
                slot.decisions += 1
                slot.predicted += float(plans.predicted_return[part.index(index)])
                for name, values in plans.metrics.items():
                    slot.metrics[name] += float(values[part.index(index)])
                slot.plan_seconds.append(planned - start)
                slot.env_seconds.append(sent - planned)
    return [finished[number] for number in range(len(jobs))]


def _receive(
    pool: Pool, slots: dict[int, _Slot], keep_observations: bool
) -> tuple[dict[int, Rollout], list[_Slot]]:
    """Add the results of the environments' chunks to their slots.

    Returns: the finished rollouts by their numbers, and the slots that lost their environment.
    """
    start = time.perf_counter()
    answers = pool.receive(list(slots))
    seconds = time.perf_counter() - start
    lost = [slots.pop(index) for index in sorted(slots.keys() - answers.keys())]
    finished: dict[int, Rollout] = {}
    for index, steps in answers.items():
        slot = slots[index]
        slot.observations += steps.observations
        if not keep_observations:
            del slot.observations[:-1]
        slot.actions.append(slot.chunk[: len(steps.rewards)])
        slot.rewards += steps.rewards
        slot.env_seconds[-1] += seconds
        if steps.terminated or steps.truncated:
            finished[slot.number] = slot.finish(steps.terminated, steps.truncated)
            del slots[index]
    return finished, lost


@dataclasses.dataclass
class _Slot:
    """An episode in progress in one environment."""

    number: int
    job: Job
    observations: list[Observation]
    chunk: np.ndarray = dataclasses.field(init=False)  # actions [C, A] being taken
    actions: list[np.ndarray] = dataclasses.field(default_factory=list)
    rewards: list[float] = dataclasses.field(default_factory=list)
    decisions: int = 0
    predicted: float = 0.0
    metrics: defaultdict[str, float] = dataclasses.field(
        default_factory=functools.partial(defaultdict, float)
    )
    plan_seconds: list[float] = dataclasses.field(default_factory=list)
    env_seconds: list[float] = dataclasses.field(default_factory=list)

    def finish(self, terminated: bool, truncated: bool) -> Rollout:
        episode = Episode(
            observations=jax.tree.map(lambda *x: np.stack(x), *self.observations),
            actions=np.concatenate(self.actions).astype(np.float32),
            rewards=np.array(self.rewards, np.float32),
            terminated=terminated,
            truncated=truncated,
            seed=self.job.seed,
        )
        return Rollout(
            episode,
            predicted_return=self.predicted / self.decisions,
            metrics={name: total / self.decisions for name, total in self.metrics.items()},
            plan_seconds=np.array(self.plan_seconds),
            env_seconds=np.array(self.env_seconds),
        )
