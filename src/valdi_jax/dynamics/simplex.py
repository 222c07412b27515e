"""TD-MPC2's latent dynamics: an MLP whose latents lie on simplices (Hansen et al., 2024)."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from valdi_jax.config import ModelConfig
from valdi_jax.dynamics.base import Dynamics, dummies, fading, masked_mean, unroll
from valdi_jax.dynamics.mlp import draw
from valdi_jax.networks.layers import apply, initialise
from valdi_jax.networks.tdmpc2 import NormedMLP
from valdi_jax.types import Array, Params


def _net(config: ModelConfig) -> NormedMLP:
    return NormedMLP(config.mlp_width, config.latent_dim, simplex=True)


def init(key: Array, *, config: ModelConfig) -> Params:
    """Parameters of the MLP."""
    z, actions = dummies(config)
    return initialise(_net(config), key, z, actions[:, 0])


def step(params: Params, z: Array, chunk: Array, *, config: ModelConfig) -> Array:
    """The latent [..., D] after an action chunk [..., C * A]."""
    return apply(_net(config), params, z, chunk)


def predict(
    params: Params,
    z: Array,
    actions: Array,
    targets: Array,
    valid: Array,
    draws: None,
    *,
    config: ModelConfig,
) -> tuple[Array, Array]:
    """Squared error of the rollout, step t weighted by rho^t, and the rollout."""
    predicted = unroll(functools.partial(step, params, config=config), z, actions)
    error = jnp.mean((predicted - targets) ** 2, axis=-1)
    return masked_mean(error * fading(config.horizon, config.rho)[None], valid), predicted


def imagine(
    params: Params, z: Array, actions: Array, noise: Array, *, config: ModelConfig, steps: int
) -> Array:
    """The rollout; shapes as in `Dynamics`."""
    return unroll(functools.partial(step, params, config=config), z, actions)


DYNAMICS = Dynamics(init, draw, predict, imagine, step)
