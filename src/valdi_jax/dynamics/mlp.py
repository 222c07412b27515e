"""The deterministic baseline: an MLP rolled out one step at a time (paper, Supp. B)."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax.numpy as jnp

from valdi_jax.config import ModelConfig
from valdi_jax.dynamics.base import Dynamics, dummies, masked_mean, unroll
from valdi_jax.networks.layers import ResidualMLP, apply, initialise
from valdi_jax.types import Array, Params


class MLPDynamics(nn.Module):
    """One step: latent [..., D] and action chunk [..., C * A] -> latent [..., D]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, z: Array, actions: Array) -> Array:
        x = jnp.concatenate([z, actions], axis=-1)
        net = ResidualMLP(self.config.mlp_width, self.config.mlp_depth, z.shape[-1], name="net")
        return z + net(x)


def init(key: Array, *, config: ModelConfig) -> Params:
    """Parameters of the MLP."""
    z, actions = dummies(config)
    return initialise(MLPDynamics(config), key, z, actions[:, 0])


def draw(keys: Array, batch_size: int, *, config: ModelConfig) -> None:
    """Nothing: the model is deterministic."""


def step(params: Params, z: Array, chunk: Array, *, config: ModelConfig) -> Array:
    """The latent [..., D] after an action chunk [..., C * A]."""
    return apply(MLPDynamics(config), params, z, chunk)


def rollout(params: Params, z: Array, actions: Array, *, config: ModelConfig) -> Array:
    """Latents [..., H, D] that follow z [..., D] under action chunks [..., H, C * A]."""
    return unroll(functools.partial(step, params, config=config), z, actions)


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
    """Mean squared error of the rollout, and the rollout; shapes as in `Dynamics`."""
    predicted = rollout(params, z, actions, config=config)
    return masked_mean((predicted - targets) ** 2, valid[..., None]), predicted


def imagine(
    params: Params, z: Array, actions: Array, noise: Array, *, config: ModelConfig, steps: int
) -> Array:
    """The rollout; shapes as in `Dynamics`."""
    return rollout(params, z, actions, config=config)


DYNAMICS = Dynamics(init, draw, predict, imagine, step)
