"""Diffuser's two losses, on windows of states and actions (Janner et al., 2022)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from valdi_jax import model
from valdi_jax.config import Config
from valdi_jax.diffusion import Posterior, add_noise, cosine_posterior
from valdi_jax.losses.base import Term
from valdi_jax.networks.scaler import scale
from valdi_jax.types import Array, Batch, Params


class PlanView(struct.PyTreeNode):
    """Inputs of Diffuser's losses."""

    plans: Array  # [B, H + 1, A + X] normalised
    returns: Array  # [B] discounted rewards from the first step to the episode's end


class PlanDraws(NamedTuple):
    """Random draws of one of Diffuser's losses."""

    timesteps: Array  # [B] int32
    noise: Array  # [B, H + 1, A + X] standard normal


def look_at_plans(params: Params, batch: Batch, *, config: Config) -> PlanView:
    """Windows of a batch as normalised plans; beyond an episode's end they are 0 before it."""
    scalers, rows = params["scalers"], config.model.horizon + 1
    states = jnp.asarray(batch.observations.vector)[:, :rows, : config.model.state_dim]
    states = states * jnp.asarray(batch.within)[..., None]
    kind = config.model.unet.scaler
    plans = jnp.concatenate(
        [
            scale(scalers["actions"], jnp.asarray(batch.actions), kind=kind),
            scale(scalers["states"], states, kind=kind),
        ],
        axis=-1,
    )
    return PlanView(jax.lax.stop_gradient(plans), jnp.asarray(batch.rewards)[:, 0, 0])


def _size(config: Config) -> int:
    return config.model.action_dim + config.model.state_dim


def draw(keys: Array, batch_size: int, *, config: Config) -> PlanDraws:
    """Draws from [2] keys."""
    shape = (batch_size, config.model.horizon + 1, _size(config))
    timesteps = jax.random.randint(keys[0], (batch_size,), 0, config.model.unet.timesteps)
    return PlanDraws(timesteps, jax.random.normal(keys[1], shape))


def loss_weights(
    horizon: int,
    actions: int,
    states: int,
    *,
    action_weight: float,
    discount: float = 1.0,
) -> np.ndarray:
    """Weights [H, A + X] of a plan's entries: falling over time, ``action_weight`` for action 0."""
    falling = np.float32(discount) ** np.arange(horizon, dtype=np.float32)
    weights = np.repeat((falling / falling.mean())[:, None], actions + states, axis=1)
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
    weights: Array | np.ndarray,
) -> Array:
    """Weighted squared error [] of clean plans estimated from noised ones.

    Args:
        predict: (noised plans [B, H, D], timesteps [B]) -> estimate of the clean plans.
        clean: [B, H, D].
        timesteps: [B] int32.
        noise: [B, H, D] standard normal.
        mask: [H, D] true where a plan is pinned, which carries no loss.
        posterior: of the schedule.
        weights: [1 or B, H, 1 or D].
    """
    noised = noise_plans(clean, timesteps, noise, mask, posterior=posterior)
    predicted = jnp.where(mask, clean, predict(noised, timesteps))
    return jnp.mean(weights * (predicted - clean) ** 2)


def noise_plans(
    clean: Array, timesteps: Array, noise: Array, mask: Array | np.ndarray, *, posterior: Posterior
) -> Array:
    """Plans [B, H, D] noised to timesteps [B], but for their pinned entries."""
    alpha_bar = jnp.asarray(posterior.alpha_bars)[timesteps][:, None, None]
    return jnp.where(mask, clean, add_noise(clean, noise, alpha_bar))


def loss(
    params: Params, ema_params: Params, view: PlanView, draws: PlanDraws, *, config: Config
) -> tuple[Array, dict[str, Array]]:
    """The U-Net's."""
    model_config, settings = config.model, config.learn.plan
    weights = loss_weights(
        model_config.horizon + 1,
        model_config.action_dim,
        model_config.state_dim,
        action_weight=settings.action_weight,
        discount=settings.discount,
    )
    error = plan_loss(
        functools.partial(model.denoise_plans, params, config=config),
        view.plans,
        *draws,
        model.known_of_plans(config),
        posterior=cosine_posterior(model_config.unet.timesteps),
        weights=weights[None],
    )
    return error, {}


def value_loss(
    params: Params, ema_params: Params, view: PlanView, draws: PlanDraws, *, config: Config
) -> tuple[Array, dict[str, Array]]:
    """Squared error of the return predicted from a noised plan."""
    posterior = cosine_posterior(config.model.unet.timesteps)
    noised = noise_plans(view.plans, *draws, model.known_of_plans(config), posterior=posterior)
    values = model.plan_value(params, noised, draws.timesteps, config=config)
    error = jnp.mean((values - view.returns) ** 2)
    return error, {"value/mean": values.mean(), "value/target_mean": view.returns.mean()}


def _weight(config: Config) -> float:
    return 1.0


TERM = Term(trains=("unet",), weight=_weight, loss=loss, keys=2, draw=draw)
VALUE_TERM = Term(trains=("plan_value",), weight=_weight, loss=value_loss, keys=2, draw=draw)
