"""The diffusion world model: H latents are generated jointly (paper, Section 3)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax import diffusion
from valdi_jax.config import ModelConfig
from valdi_jax.dynamics.base import Dynamics, dummies, masked_mean
from valdi_jax.networks.layers import apply, initialise
from valdi_jax.networks.transformer import DiffusionTransformer
from valdi_jax.types import Array, Params


class DiffusionDraws(NamedTuple):
    """Random draws of one update."""

    noise: Array  # [B, H, D] standard normal
    timesteps: Array  # [B] int32, T - 1 for the share that learns it, else uniform on 0 .. T - 1


def _net(config: ModelConfig) -> DiffusionTransformer:
    return DiffusionTransformer(config, config.diffusion_timesteps)


def init(key: Array, *, config: ModelConfig) -> Params:
    """Parameters of the diffusion transformer."""
    z, actions = dummies(config)
    noised = np.zeros((1, config.horizon, config.latent_dim), np.float32)
    return initialise(_net(config), key, z, actions, noised, np.zeros(1, np.int32))


def draw(keys: Array, batch_size: int, *, config: ModelConfig) -> DiffusionDraws:
    """Noise and timesteps for ``batch_size`` segments from [2] keys."""
    noise = jax.random.normal(keys[0], (batch_size, config.horizon, config.latent_dim))
    timesteps = jax.random.randint(keys[1], (batch_size,), 0, config.diffusion_timesteps)
    # Spread evenly, as a batch has recorded segments behind the agent's own.
    before = np.floor(config.one_step_share * np.arange(batch_size + 1) + 1e-6)
    timesteps = jnp.where(np.diff(before) > 0, config.diffusion_timesteps - 1, timesteps)
    return DiffusionDraws(noise, timesteps)


def velocity(
    params: Params, z: Array, actions: Array, noised: Array, timestep: Array, *, config: ModelConfig
) -> Array:
    """Velocity [..., H, D] of a noised trajectory [..., H, D] at a timestep [...]."""
    return apply(_net(config), params, z, actions, noised, timestep)


def predict(
    params: Params,
    z: Array,
    actions: Array,
    targets: Array,
    valid: Array,
    draws: DiffusionDraws,
    *,
    config: ModelConfig,
) -> tuple[Array, Array]:
    """Mean squared error of the velocity, and the one-step denoised estimate (equations 1 and 7).

    Shapes as in `Dynamics`.
    """
    schedule = jnp.asarray(diffusion.alpha_bars(config.diffusion_timesteps))
    alpha_bar = schedule[draws.timesteps][:, None, None]
    noised = diffusion.add_noise(targets, draws.noise, alpha_bar)
    target = diffusion.velocity_target(targets, draws.noise, alpha_bar)
    predicted = velocity(params, z, actions, noised, draws.timesteps, config=config)
    loss = masked_mean((predicted - target) ** 2, valid[..., None])
    return loss, diffusion.denoise(noised, predicted, alpha_bar)


def imagine(
    params: Params, z: Array, actions: Array, noise: Array, *, config: ModelConfig, steps: int
) -> Array:
    """Latents that follow z, by ``steps`` steps of DDIM from ``noise``; shapes as in `Dynamics`."""

    def velocity_fn(noised: Array, timestep: Array) -> Array:
        # The sampler keeps its own precision, independent of the network's.
        answer = velocity(params, z, actions, noised.astype(z.dtype), timestep, config=config)
        return answer.astype(noised.dtype)

    return diffusion.ddim(velocity_fn, noise, steps=steps, timesteps=config.diffusion_timesteps)


DYNAMICS = Dynamics(init, draw, predict, imagine)
