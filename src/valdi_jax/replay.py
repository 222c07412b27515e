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
        """Whether any episode is long enough to hold a segment."""
        return any(len(episode) >= self._config.segment_steps for episode in self._episodes)

    def sample(self, rng: np.random.Generator, batch_size: int) -> Batch:
        """Draw segments: an episode uniformly, then a start uniformly within it.

        A segment lies within one episode, so episodes shorter than a segment are never drawn.

        Args:
            rng: source of the draws; the same state gives the same batch.
            batch_size: segments B.

        Raises:
            ValueError: if no episode is long enough to hold a segment.
        """
        model, span = self._config.model, self._config.segment_steps
        eligible = [episode for episode in self._episodes if len(episode) >= span]
        if not eligible:
            raise ValueError(f"no episode of at least {span} steps to sample from")
        drawn = [eligible[i] for i in rng.integers(len(eligible), size=batch_size)]
        starts = rng.integers([len(episode) - span + 1 for episode in drawn])
        frames = np.arange(model.horizon + 2) * model.chunk

        def gather(field: str) -> np.ndarray | None:
            if getattr(drawn[0].observations, field) is None:
                return None
            arrays = (getattr(episode.observations, field) for episode in drawn)
            return np.stack([a[s + frames] for a, s in zip(arrays, starts, strict=True)])

        def windows(field: str) -> np.ndarray:
            arrays = (getattr(episode, field) for episode in drawn)
            return np.stack([a[s : s + span] for a, s in zip(arrays, starts, strict=True)])

        lead = (batch_size, model.horizon + 1)
        terminals = np.zeros(lead, np.float32)
        # Only the last chunk of a segment can hold the terminal step: it is the episode's last.
        terminals[:, -1] = [
            e.terminated and s + span == len(e) for e, s in zip(drawn, starts, strict=True)
        ]
        return Batch(
            observations=Observation(image=gather("image"), vector=gather("vector")),
            actions=windows("actions").reshape(*lead, -1),
            rewards=windows("rewards").reshape(*lead, model.chunk),
            terminals=terminals,
        )
