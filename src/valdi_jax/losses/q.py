"""The critics' temporal-difference loss (TD-MPC2; Hansen et al., 2024)."""

from __future__ import annotations

from typing import NamedTuple

import jax

from valdi_jax import model
from valdi_jax.config import Config
from valdi_jax.dynamics.base import fading, masked_mean
from valdi_jax.losses.base import Term, View, regression
from valdi_jax.losses.value import td_targets
from valdi_jax.networks.twohot import decode
from valdi_jax.types import Array, Params


class QDraws(NamedTuple):
    """Random draws of one update."""

    noise: Array  # [B, H + 1, C * A] of the policy at the latents of the target
    pair: Array  # [2] int, the critics whose minimum is the target
    dropout: Array  # PRNG key


def draw(keys: Array, batch_size: int, *, config: Config) -> QDraws:
    """Draws from [3] keys."""
    shape = (batch_size, config.model.horizon + 1, config.model.chunk * config.model.action_dim)
    return QDraws(
        jax.random.normal(keys[0], shape), model.draw_pair(keys[1], config=config), keys[2]
    )


def loss(
    params: Params, ema_params: Params, view: View, draws: QDraws, *, config: Config
) -> tuple[Array, dict[str, Array]]:
    """Mean TD error of all critics at the predicted latents.

    The target is the lesser of two EMA critics, at an action of the policy prior.
    """
    action = model.policy(params, view.next_latents, draws.noise, config=config).action
    following = model.q_values(ema_params, view.next_latents, action, config=config)
    target = jax.lax.stop_gradient(
        td_targets(
            view.rewards,
            following[draws.pair].min(axis=0),
            view.terminals,
            discount=config.learn.discount,
            td_lambda=config.learn.td_lambda,
        )
    )
    dropout = draws.dropout if config.model.dropout else None
    output = model.q_outputs(params, view.trajectory, view.actions, config=config, dropout=dropout)
    error = regression(output, target[None], config=config.model)  # [E, B, H + 1]
    weights = fading(config.model.horizon + 1, config.model.rho)[None, None]
    predicted = decode(output) if config.model.bins else output
    return masked_mean(error * weights, view.scored[None]), {
        "value/mean": masked_mean(predicted, view.scored[None]),
        "value/target_mean": masked_mean(target, view.scored),
    }


TERM = Term(
    trains=("encoder", "dynamics", "q"),
    weight=lambda config: config.learn.value_weight,
    loss=loss,
    keys=3,
    draw=draw,
    needs=("policy",),
)
