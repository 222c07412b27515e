"""Where a run's episodes come from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import gymnasium as gym
import jax
import numpy as np

from valdi_jax.config import Config
from valdi_jax.data.rollout import Job, Rollout, exploration_noise, roll_out
from valdi_jax.envs import evaluation_seeds, interface_of
from valdi_jax.envs.workers import Pool, make_pool
from valdi_jax.observation import Observation
from valdi_jax.registry import Registry
from valdi_jax.types import Params

Interrupt = Callable[[], None]  # raises once the work is to stop


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
        config: the run's configuration, with what follows from the source.
    """

    example: Observation
    config: Config

    def next_round(self, progress: Progress) -> range:
        """Numbers of the episodes that come next."""

    def collect(
        self, params: Params, numbers: Sequence[int], interrupt: Interrupt
    ) -> list[Rollout]:
        """These episodes, with the parameters of now."""

    def count(self, progress: Progress, rollouts: Sequence[Rollout]) -> None:
        """Add the episodes of a round to the counters."""

    def due(self, progress: Progress) -> int:
        """Updates that there have to have been since the run began."""

    def evaluate(self, params: Params, interrupt: Interrupt) -> list[Rollout]:
        """Fixed episodes without exploration noise."""

    def notices(self) -> list[str]:
        """What is to be said of its work since they were last asked for."""

    def close(self) -> None:
        """Release what it holds."""


class Environments:
    """The environments that a configuration names, in which the agent itself acts.

    Args:
        config: the run's configuration.
        make: called as ``make(config.env, training=True)`` for an environment to train in, and with
            ``training=False`` for one to be scored in; it must pickle if there are several.

    Raises:
        UsageError: if an agent cannot see or act in them.
    """

    def __init__(self, config: Config, make: Callable[..., gym.Env]):
        self._make = make
        interface = interface_of(functools.partial(make, config.env, training=True))
        self.example = interface.example
        self.config = config.replace(model={"action_dim": interface.action_dim})
        self._key = jax.random.split(jax.random.key(config.seed))[1]
        self._restarts = 0  # of workers, that were said

    @functools.cached_property
    def pool(self) -> Pool:
        """The environments, made when they are first needed."""
        config = self.config
        return make_pool(
            functools.partial(self._make, config.env, training=True),
            config.collect.num_envs,
            example=self.example,
            chunk=config.model.chunk,
            last_only=config.env.render_every == "chunk",
            timeout=config.collect.worker_timeout,
        )

    def next_round(self, progress: Progress) -> range:
        """One episode in every environment."""
        first, collect = progress.episodes, self.config.collect
        return range(first, min(first + collect.num_envs, collect.episodes))

    def collect(
        self, params: Params, numbers: Sequence[int], interrupt: Interrupt
    ) -> list[Rollout]:
        """See `Source`; with exploration noise."""
        return roll_out(
            params,
            self.pool,
            [self._job(number) for number in numbers],
            config=self.config,
            noise_std=self.noise_std(numbers[0]),
            groups=2 if self.config.collect.overlap else 1,
            on_decision=interrupt,
        )

    def noise_std(self, number: int) -> float:
        """Exploration noise of an episode."""
        collect = self.config.collect
        return exploration_noise(number - collect.seed_episodes, collect)

    def count(self, progress: Progress, rollouts: Sequence[Rollout]) -> None:
        """See `Source`; nothing is owed for the seed episodes."""
        steps = [len(rollout.episode) for rollout in rollouts]
        seeding = max(0, self.config.collect.seed_episodes - progress.episodes)
        progress.episodes += len(steps)
        progress.env_steps += sum(steps)
        progress.learning_steps += sum(steps[seeding:])

    def due(self, progress: Progress) -> int:
        """Updates by the ratio of updates to environment steps."""
        # The ratio is a decimal: a hair is added so that 0.1 of 30 steps is 3, however it rounds.
        return int(progress.learning_steps * self.config.learn.updates_per_step + 1e-6)

    def evaluate(self, params: Params, interrupt: Interrupt) -> list[Rollout]:
        """See `Source`."""
        factory = functools.partial(self._make, self.config.env, training=False)
        with self.pool.serving("evaluation", factory, last_only=True):
            return roll_out(
                params,
                self.pool,
                evaluation_jobs(self.config.eval.episodes),
                config=self.config,
                keep_observations=False,
                on_decision=interrupt,
            )

    def notices(self) -> list[str]:
        """See `Source`."""
        lost, self._restarts = self.pool.restarts - self._restarts, self.pool.restarts
        if not lost:
            return []
        return [
            f"warning: {lost} environment workers died or did not answer; new ones ran their "
            "episodes again"
        ]

    def close(self) -> None:
        """End the environments, if there are any yet."""
        if "pool" in self.__dict__:
            self.pool.close()

    def _job(self, number: int) -> Job:
        """Training episode ``number``: its seed and key follow from the run's seed alone."""
        seed = np.random.default_rng([1, self.config.seed, number]).integers(2**31 - 1)
        return Job(int(seed), jax.random.fold_in(self._key, number))


def evaluation_jobs(episodes: int) -> list[Job]:
    """The first of the 100 fixed episodes; the planner's keys follow from their seeds."""
    key = jax.random.key(0)
    return [Job(seed, jax.random.fold_in(key, seed)) for seed in evaluation_seeds(episodes)]


SOURCES: Registry[Callable[..., Source]] = Registry(
    "--collect.source", {"environment": Environments}
)
