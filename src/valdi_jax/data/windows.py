"""Windows of recorded episodes, as Diffuser draws them (Janner et al., 2022)."""

from __future__ import annotations

import dataclasses

import numpy as np

from valdi_jax.config import Config
from valdi_jax.data.episode import Episode


def window_count(steps: int, horizon: int, longest: int, *, padding: bool) -> int:
    """Starts of windows of H steps in an episode: 0 to this, without it.

    Args:
        steps: of the episode.
        horizon: H.
        longest: steps that an episode can have.
        padding: whether a window may reach beyond the episode's end.
    """
    return max(0, min(steps - 1, longest - horizon) if padding else steps - horizon)


def returns_to_go(rewards: np.ndarray, discount: float) -> np.ndarray:
    """Discounted sum [L] of each reward [L] and all that follow, without bootstrapping."""
    returns = np.zeros(len(rewards), np.float64)
    following = 0.0
    for step in range(len(rewards) - 1, -1, -1):
        following = rewards[step] + discount * following
        returns[step] = following
    return returns.astype(np.float32)


def prepared(episode: Episode, *, config: Config) -> Episode:
    """An episode as the replay buffer keeps it: Diffuser's holds returns instead of rewards.

    Of a terminated episode, a penalty is subtracted from the last reward first.
    """
    if "plan_value" not in config.model.networks:
        return episode
    rewards = config.learn.reward_scale * episode.rewards.astype(np.float64)
    rewards[-1] -= config.learn.plan.penalty * episode.terminated
    returns = returns_to_go(rewards, config.learn.discount)
    return dataclasses.replace(episode, rewards=returns)
