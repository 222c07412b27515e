"""The interface of a world model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax.config import ModelConfig
from valdi_jax.types import Array


class Dynamics(NamedTuple):
    """A world model as pure functions; ``config`` is the `ModelConfig`.

    Attributes:
        init: (key, *, config) -> parameters, also with a traced key.
        draw: (keys [2], batch size, *, config) -> random draws of one update, any pytree.
        predict: (params, z [B, D], actions [B, H, C * A], targets [B, H, D], valid [B, H], draws,
            *, config) -> loss [] and predicted latents [B, H, D], on which the heads are trained.
            ``valid`` is 0 where a target is padding.
        imagine: (params, z [..., D], actions [..., H, C * A], noise [..., H, D], *, config, steps)
            -> latents [..., H, D] that follow z. ``steps`` are the sampler's, if any.
        step: (params, z [..., D], chunk [..., C * A], *, config) -> the next latent [..., D], of
            models that imagine one step at a time.
    """

    init: Callable[..., Any]
    draw: Callable[..., Any]
    predict: Callable[..., tuple[Array, Array]]
    imagine: Callable[..., Array]
    step: Callable[..., Array] | None = None


def dummies(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Zero latent [1, D] and action chunks [1, H, C * A], for initialisation."""
    actions = np.zeros((1, config.horizon, config.chunk * config.action_dim), np.float32)
    return np.zeros((1, config.latent_dim), np.float32), actions


def unroll(step: Callable[[Array, Array], Array], z: Array, actions: Array) -> Array:
    """Latents [..., H, D] that follow z [..., D] under chunks [..., H, C * A], one at a time."""

    def body(z: Array, chunk: Array) -> tuple[Array, Array]:
        z = step(z, chunk)
        return z, z

    _, trajectory = jax.lax.scan(body, z, jnp.moveaxis(actions, -2, 0))
    return jnp.moveaxis(trajectory, 0, -2)


def fading(steps: int, rho: float) -> Array:
    """Weights rho^t [steps] of a rollout's losses."""
    return rho ** jnp.arange(steps, dtype=jnp.float32)


def masked_mean(x: Array, valid: Array) -> Array:
    """Mean [] of x where ``valid``, which broadcasts against it, is 1."""
    valid = jnp.broadcast_to(valid, x.shape)
    return jnp.sum(x * valid) / jnp.sum(valid)
