"""The record of one episode."""

from __future__ import annotations

import dataclasses

import numpy as np

from valdi_jax.observation import Observation


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode of L environment steps.

    The F observations are the first, every ``config.frame_stride``-th after it, and the last.
    """

    observations: Observation  # [F, ...]
    actions: np.ndarray  # [L, A] float32
    rewards: np.ndarray  # [L] float32
    terminated: bool  # it ended in a terminal state
    truncated: bool  # it was cut off by a limit
    seed: int  # of the environment's reset

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def episode_return(self) -> float:
        """Undiscounted sum of the rewards."""
        return float(np.sum(self.rewards, dtype=np.float64))
