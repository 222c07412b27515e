"""Sources of a run's episodes."""

from __future__ import annotations

import dataclasses
import functools
import pickle
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import gymnasium as gym
import jax
import numpy as np

from valdi_jax.config import Config
from valdi_jax.data.collector import Collector, Drive, Interrupt, LocalCollector, holding
from valdi_jax.data.episode import Episode
from valdi_jax.data.recorded import read_recorded, to_episodes
from valdi_jax.data.rollout import Job, Rollout, exploration_noise, roll_out
from valdi_jax.envs import (
    evaluation_seeds,
    import_modules,
    imported_modules,
    interface_of,
    own_env,
)
from valdi_jax.envs.spaces import Interface
from valdi_jax.envs.workers import Pool, make_pool
from valdi_jax.errors import UsageError
from valdi_jax.observation import Observation
from valdi_jax.registry import Registry
from valdi_jax.types import Params


@dataclasses.dataclass
class Progress:
    """Counters of a run."""

    episodes: int = 0  # collected
    env_steps: int = 0  # collected
    learning_steps: int = 0  # of these, collected after the seed episodes
    seconds: float = 0.0  # spent training


class Source(Protocol):
    """A source of episodes: an environment, or recorded data.

    Attributes:
        example: one observation, without a batch axis.
        config: the run's configuration, with the settings that the source determines.
    """

    example: Observation
    config: Config

    def open(self) -> Collector:
        """Start what it needs, from the main thread; returns who drives its episodes."""

    def recorded(self) -> list[Episode]:
        """Recorded episodes, which stay in the replay buffer."""

    def next_round(self, first: int) -> range:
        """Numbers of the episodes of the round that begins with ``first``."""

    def jobs(self, numbers: Sequence[int]) -> list[Job]:
        """These episodes, for the collector."""

    def noise_std(self, number: int) -> float:
        """Exploration noise of the round that begins with episode ``number``."""

    def count(
        self, progress: Progress, numbers: Sequence[int], rollouts: Sequence[Rollout]
    ) -> None:
        """Add the episodes of a round to the counters."""

    def due(self, progress: Progress) -> int:
        """Updates due since the run began."""

    def evaluate(self, params: Params, interrupt: Interrupt) -> list[Rollout]:
        """Roll out the fixed episodes without exploration noise."""

    def notices(self) -> list[str]:
        """Messages about its work since the last call."""

    def close(self) -> None:
        """Release its resources."""


def sized(config: Config, interface: Interface) -> Config:
    """A configuration with the sizes of an environment's actions and, for Diffuser, states.

    Raises:
        UsageError: if Diffuser cannot plan with its observations.
    """
    sizes, example = {"action_dim": interface.action_dim}, interface.example
    if config.diffuses_plans:
        goal = config.model.unet.goal
        if example.image is not None or example.vector is None:
            raise UsageError("--model.networks unet plans with vector observations, not images")
        sizes["state_dim"] = example.vector.size - goal
        if sizes["state_dim"] < max(1, goal):
            raise UsageError(
                f"--model.unet.goal is {goal}, of an observation of {example.vector.size} numbers"
            )
        waypoints = config.planner.diffuser.controller == "waypoints"
        if waypoints and sizes["state_dim"] != 2 * sizes["action_dim"]:
            raise UsageError(
                f"--planner.diffuser.controller waypoints needs a position and a velocity for "
                f"each action, not {sizes['state_dim']} numbers for {sizes['action_dim']}"
            )
    return config.replace(model=sizes)


class Environments:
    """Rollouts of the agent in the environments that a configuration names.

    ``make`` is called as ``make(config.env, training=True)`` for training and with
    ``training=False`` for evaluation; it must be picklable if there are several environments.
    ``data`` are recorded episodes (see `to_episodes`), in place of those that ``config`` names.

    Raises:
        UsageError: if their observations or actions are not supported.
    """

    def __init__(
        self,
        config: Config,
        make: Callable[..., gym.Env],
        data: Iterable[Any] | None = None,
    ):
        if config.collect.num_envs > 1:
            try:
                pickle.dumps(make)
            except Exception as error:
                raise UsageError(
                    f"{make!r} cannot be sent to worker processes ({error}): define it at module "
                    "level"
                ) from error
        self._factory = functools.partial(own_env, make, config.env)
        interface = interface_of(functools.partial(self._factory, training=True))
        self.example = interface.example
        self.config = sized(config, interface)
        self._interface, self._data = interface, data
        self._key = jax.random.split(jax.random.key(config.seed))[1]
        self._make = make
        self._restarts = 0  # of workers, already reported
        self._using = threading.Lock()  # held by whoever uses the pool
        self._failed: Exception | None = None  # what left the pool unusable

    @functools.cached_property
    def pool(self) -> Pool:
        """The environments, made on first use."""
        config = self.config
        return make_pool(
            functools.partial(self._factory, training=True),
            config.collect.num_envs,
            example=self.example,
            chunk=config.model.chunk,
            last_only=config.env.render_every == "chunk",
            timeout=config.collect.worker_timeout,
        )

    def open(self) -> Collector:
        """Start the environments."""
        collect = self.config.collect
        if collect.cluster:
            from valdi_jax.data.cluster import RayCollector

            return RayCollector(
                collect, functools.partial(_make_drive, self.config, self._make, imported_modules())
            )
        _ = self.pool  # made here, as processes inherit what the main thread ignores
        return LocalCollector(self.drive, beside=collect.lag > 0)

    def recorded(self) -> list[Episode]:
        """See `Source`.

        Raises:
            UsageError: if they cannot be read, or do not fit the environment.
        """
        if self._data is not None:
            return to_episodes(self._data, self._interface, self.config)
        name = self.config.collect.data
        return read_recorded(name, self._interface, self.config) if name else []

    def next_round(self, first: int) -> range:
        """By default one episode per environment."""
        collect = self.config.collect
        count = collect.episodes_per_round or collect.num_envs
        return range(first, min(first + count, collect.episodes))

    def jobs(self, numbers: Sequence[int]) -> list[Job]:
        return [self._job(number) for number in numbers]

    def drive(
        self, params: Params, jobs: Sequence[Job], noise_std: float, interrupt: Interrupt
    ) -> list[Rollout]:
        """Drive episodes in this process."""
        with holding(self._using, interrupt):
            try:
                return roll_out(
                    params,
                    self.pool,
                    jobs,
                    config=self.config,
                    noise_std=noise_std,
                    groups=2 if self.config.collect.lag else 1,
                    on_decision=interrupt,
                )
            except Exception as error:  # an environment may raise anything
                self._failed = error
                raise

    def noise_std(self, number: int) -> float:
        collect = self.config.collect
        return exploration_noise(number - collect.seed_episodes, collect)

    def count(
        self, progress: Progress, numbers: Sequence[int], rollouts: Sequence[Rollout]
    ) -> None:
        """See `Source`; no updates are due for the seed episodes."""
        steps = [len(rollout.episode) for rollout in rollouts]
        seeding = max(0, self.config.collect.seed_episodes - progress.episodes)
        progress.episodes += len(steps)
        progress.env_steps += sum(steps)
        progress.learning_steps += sum(steps[seeding:])

    def due(self, progress: Progress) -> int:
        # The margin is for rounding: 0.1 of 30 steps must be 3.
        return int(progress.learning_steps * self.config.learn.updates_per_step + 1e-6)

    def evaluate(self, params: Params, interrupt: Interrupt) -> list[Rollout]:
        factory = functools.partial(self._factory, training=False)
        held = holding(self._using, interrupt)
        with held, self.pool.serving("evaluation", factory, last_only=True):
            if self._failed is not None:  # of a round whose turn has not come
                raise self._failed
            return roll_out(
                params,
                self.pool,
                evaluation_jobs(self.config.eval.episodes),
                config=self.config,
                keep_observations=False,
                on_decision=interrupt,
            )

    def notices(self) -> list[str]:
        before = self._restarts
        self._restarts = self.pool.restarts if "pool" in self.__dict__ else 0
        if not (lost := self._restarts - before):
            return []
        return [
            f"warning: {lost} environment workers died or did not answer; new ones ran their "
            "episodes again"
        ]

    def close(self) -> None:
        if "pool" in self.__dict__:
            self.pool.close()

    def _job(self, number: int) -> Job:
        """Training episode ``number``; its seed and key depend on the run's seed alone."""
        seed = np.random.default_rng([1, self.config.seed, number]).integers(2**31 - 1)
        return Job(int(seed), jax.random.fold_in(self._key, number))


def _make_drive(config: Config, make: Callable[..., gym.Env], imports: Sequence[str]) -> Drive:
    """What drives episodes in another process, which may be on another machine."""
    import_modules(imports)
    return Environments(config, make).drive


class Data(Environments):
    """Recorded episodes alone: each epoch owes a number of updates, and collects nothing."""

    def open(self) -> Collector:
        """Start nothing: only evaluations need an environment."""
        return LocalCollector(lambda *_: [])

    def recorded(self) -> list[Episode]:
        episodes = super().recorded()
        if not episodes:
            raise UsageError("--collect.source data needs --data minari:ID, the recorded episodes")
        return episodes

    def next_round(self, first: int) -> range:
        return range(first, first + 1)

    def jobs(self, numbers: Sequence[int]) -> list[Job]:
        return []

    def count(
        self, progress: Progress, numbers: Sequence[int], rollouts: Sequence[Rollout]
    ) -> None:
        progress.episodes += len(numbers)

    def due(self, progress: Progress) -> int:
        return progress.episodes * self.config.collect.epoch


def evaluation_jobs(episodes: int) -> list[Job]:
    """The first of the 100 fixed episodes; the planner's keys derive from their seeds."""
    key = jax.random.key(0)
    return [Job(seed, jax.random.fold_in(key, seed)) for seed in evaluation_seeds(episodes)]


SOURCES: Registry[Callable[..., Source]] = Registry(
    "--collect.source", {"environment": Environments, "data": Data}
)
