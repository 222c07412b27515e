"""The value heads' temporal-difference loss (paper, Supp. C)."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from valdi_jax import model
from valdi_jax.config import Config
from valdi_jax.dynamics.base import fading, masked_mean
from valdi_jax.losses.base import Term, View, regression
from valdi_jax.losses.reward import chunk_rewards
from valdi_jax.networks.twohot import decode
from valdi_jax.types import Array, Params


def td_targets(
    rewards: Array,
    next_values: Array,
    terminals: Array,
    *,
    discount: float,
    td_lambda: float = 0.0,
) -> Array:
    """TD(lambda) targets [..., H + 1] in world-model steps, one-step targets by default.

    Longer returns use the stored actions, without off-policy correction.

    Args:
        rewards: [..., H + 1, C] of each environment step.
        next_values: [..., H + 1] value after each chunk.
        terminals: [..., H + 1] 1 where the episode terminated within the chunk: no bootstrap.
        discount: per environment step.
        td_lambda: weight of the longer returns within the segment (Sutton & Barto, 2018, 12.18).
    """
    chunk = rewards.shape[-1]
    chex.assert_equal_shape([rewards[..., 0], next_values, terminals])
    rewards = chunk_rewards(rewards, discount=discount)
    continues = discount**chunk * (1 - terminals)
    if td_lambda == 0:
        return rewards + continues * next_values

    def step(after: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        reward, continues, value = inputs
        target = reward + continues * ((1 - td_lambda) * value + td_lambda * after)
        return target, target

    inputs = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), (rewards, continues, next_values))
    _, targets = jax.lax.scan(step, next_values[..., -1], inputs, reverse=True)
    return jnp.moveaxis(targets, 0, -1)


def loss(
    params: Params, ema_params: Params, view: View, draws: None, *, config: Config
) -> tuple[Array, dict[str, Array]]:
    """Mean TD error of all heads at the predicted latents, with EMA targets."""
    target = td_targets(
        view.rewards,
        jax.lax.stop_gradient(model.value(ema_params, view.next_latents, config=config)),
        view.terminals,
        discount=config.learn.discount,
        td_lambda=config.learn.td_lambda,
    )
    output = model.value_outputs(params, view.trajectory, config=config)
    error = regression(output, target[None], config=config.model)  # [E, B, H + 1]
    predicted = decode(output) if config.model.bins else output
    weights = fading(config.model.horizon + 1, config.model.rho)[None, None]
    valid = view.scored[None]
    return masked_mean(error * weights, valid), {
        "value/mean": masked_mean(predicted, valid),
        "value/target_mean": masked_mean(target, view.scored),
    }


TERM = Term(
    trains=("encoder", "dynamics", "value"),
    weight=lambda config: config.learn.value_weight,
    loss=loss,
)
