"""Diffuser's two losses, on windows of states and actions (Janner et al., 2022)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from valdi_jax.diffusion import Posterior, add_noise
from valdi_jax.types import Array


def loss_weights(
    horizon: int,
    actions: int,
    states: int,
    *,
    action_weight: float,
    discount: float = 1.0,
    state_weights: Sequence[float] = (),
) -> np.ndarray:
    """Weights [H, A + S] of a plan's entries: falling over time, ``action_weight`` for action 0.

    ``state_weights`` are factors on the state's dimensions, 1 where it ends.
    """
    weights = np.ones((horizon, actions + states), np.float32)
    weights[:, actions : actions + len(state_weights)] = state_weights
    falling = np.float32(discount) ** np.arange(horizon, dtype=np.float32)
    weights *= (falling / falling.mean())[:, None]
    weights[0, :actions] = action_weight
    return weights


def plan_loss(
    predict: Callable[[Array, Array], Array],
    clean: Array,
    timesteps: Array,
    noise: Array,
    mask: Array | np.ndarray,
    *,
    posterior: Posterior,
    weights: np.ndarray,
) -> Array:
    """Weighted squared error [] of clean plans estimated from noised ones.

    Args:
        predict: (noised plans [B, H, D], timesteps [B]) -> estimate of the clean plans.
        clean: [B, H, D].
        timesteps: [B] int32.
        noise: [B, H, D] standard normal.
        mask: [H, D] true where a plan is pinned, which carries no loss.
        posterior: of the schedule.
        weights: [H, D].
    """
    noised = noise_plans(clean, timesteps, noise, mask, posterior=posterior)
    predicted = jnp.where(mask, clean, predict(noised, timesteps))
    return jnp.mean(weights[None] * (predicted - clean) ** 2)


def noise_plans(
    clean: Array, timesteps: Array, noise: Array, mask: Array | np.ndarray, *, posterior: Posterior
) -> Array:
    """Plans [B, H, D] noised to timesteps [B], but for their pinned entries."""
    alpha_bar = jnp.asarray(posterior.alpha_bars)[timesteps][:, None, None]
    return jnp.where(mask, clean, add_noise(clean, noise, alpha_bar))
