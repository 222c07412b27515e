"""Trajectory ring buffer: whole episodes in, training segments out (paper, Table 3)."""

from __future__ import annotations

import dataclasses
from collections import deque

import numpy as np

from valdi_jax.config import Config
from valdi_jax.types import Batch, Observation


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode of L environment steps, as it happened."""

    observations: Observation  # [L + 1, ...]
    actions: np.ndarray  # [L, A] float32
    rewards: np.ndarray  # [L] float32
    terminated: bool  # it ended in a terminal state
    truncated: bool  # it was cut off by a limit
    seed: int  # the environment was reset with

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def episode_return(self) -> float:
        """Undiscounted sum of the rewards."""
        return float(np.sum(self.rewards, dtype=np.float64))


class Replay:
    """The last ``config.replay.capacity`` episodes, in memory.

    A full CarRacing episode takes 16.6 MB, the paper's thousand of them 16.6 GB.
    """

    def __init__(self, config: Config):
        self._config = config
        self._episodes: deque[Episode] = deque(maxlen=config.replay.capacity)

    def add(self, episode: Episode) -> None:
        """Append an episode; the oldest leaves when the buffer is full."""
        self._episodes.append(episode)

    def __len__(self) -> int:
        return len(self._episodes)

    @property
    def ready(self) -> bool:
        """Whether there is any segment to draw."""
        return any(self._starts(episode) for episode in self._episodes)

    def _starts(self, episode: Episode) -> int:
        """How many steps of an episode a segment can start at.

        A segment fits within its episode, unless that ends in a terminal state that the TD target
        stops at: such a segment may reach beyond the end, so that the last steps are learnt from as
        often as the others, however short the episode is.
        """
        if episode.terminated and not self._config.learn.bootstrap_terminal:
            return len(episode)
        return max(0, len(episode) - self._config.segment_steps + 1)

    def sample(self, rng: np.random.Generator, batch_size: int) -> Batch:
        """Draw segments: an episode uniformly, then a start uniformly within it.

        Beyond a terminal state the last observation is repeated, and actions and rewards are 0.

        Args:
            rng: source of the draws; the same state gives the same batch.
            batch_size: segments B.

        Raises:
            ValueError: if no episode is long enough to hold a segment.
        """
        model, span = self._config.model, self._config.segment_steps
        eligible = [episode for episode in self._episodes if self._starts(episode)]
        if not eligible:
            raise ValueError(f"no episode of at least {span} steps to sample from")
        drawn = [eligible[i] for i in rng.integers(len(eligible), size=batch_size)]
        starts = rng.integers([self._starts(episode) for episode in drawn])
        ends = np.array([len(episode) for episode in drawn])
        steps = starts[:, None] + np.arange(span)  # [B, span]
        frames = starts[:, None] + np.arange(model.horizon + 2) * model.chunk  # [B, H + 2]
        within = steps < ends[:, None]
        steps = np.minimum(steps, ends[:, None] - 1)
        frames = np.minimum(frames, ends[:, None])

        def gather(field: str) -> np.ndarray | None:
            if getattr(drawn[0].observations, field) is None:
                return None
            arrays = (getattr(episode.observations, field) for episode in drawn)
            return np.stack([array[i] for array, i in zip(arrays, frames, strict=True)])

        actions = np.stack([e.actions[i] for e, i in zip(drawn, steps, strict=True)])
        rewards = np.stack([e.rewards[i] for e, i in zip(drawn, steps, strict=True)])
        terminated = np.array([episode.terminated for episode in drawn])
        last = within & (steps == ends[:, None] - 1) & terminated[:, None]

        lead = (batch_size, model.horizon + 1)
        return Batch(
            observations=Observation(image=gather("image"), vector=gather("vector")),
            actions=(actions * within[..., None]).reshape(*lead, -1),
            rewards=(rewards * within).reshape(*lead, model.chunk),
            terminals=last.reshape(*lead, model.chunk).any(axis=-1).astype(np.float32),
        )
