"""The reward head's loss (paper, Supp. C)."""

from __future__ import annotations

import jax.numpy as jnp

from valdi_jax import model
from valdi_jax.config import Config
from valdi_jax.dynamics.base import fading, masked_mean
from valdi_jax.losses.base import Term, View, regression
from valdi_jax.types import Array, Params


def chunk_rewards(rewards: Array, *, discount: float) -> Array:
    """Discounted reward of each chunk: [..., C] -> [...]."""
    return rewards @ (discount ** jnp.arange(rewards.shape[-1], dtype=rewards.dtype))


def loss(
    params: Params, ema_params: Params, view: View, draws: None, *, config: Config
) -> tuple[Array, dict[str, Array]]:
    """Mean error of the chunks' rewards at the predicted latents, squared or cross entropy."""
    target = chunk_rewards(view.rewards, discount=config.learn.discount)
    output = model.reward_output(params, view.trajectory, view.actions, config=config)
    error = regression(output, target, config=config.model)
    weights = fading(config.model.horizon + 1, config.model.rho)[None]
    return masked_mean(error * weights, view.scored), {}


TERM = Term(
    trains=("encoder", "dynamics", "reward"),
    weight=lambda config: config.learn.reward_weight,
    loss=loss,
)
