"""World models behind one interface: imagine a trajectory, and what to regress in training.

Each takes the dynamics parameters, a latent and a sequence of action chunks. The diffusion model
generates the H latents jointly; the MLP baseline is rolled out one step at a time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from valdi_jax import diffusion
from valdi_jax.config import ModelConfig
from valdi_jax.heads import MLPDynamics
from valdi_jax.transformer import DiffusionTransformer
from valdi_jax.types import Array, Draws, Params


def init_dynamics(key: Array, *, config: ModelConfig) -> Params:
    """Parameters of the world model that the configuration names."""
    z = jnp.zeros((1, config.latent_dim))
    actions = jnp.zeros((1, config.horizon, config.chunk * config.action_dim))
    if config.dynamics == "mlp":
        return MLPDynamics(config).init(key, z, actions[:, 0])["params"]
    noised = jnp.zeros((1, config.horizon, config.latent_dim))
    timestep = jnp.zeros((1,), jnp.int32)
    return DiffusionTransformer(config).init(key, z, actions, noised, timestep)["params"]


def velocity(
    params: Params, z: Array, actions: Array, noised: Array, timestep: Array, *, config: ModelConfig
) -> Array:
    """Velocity [..., H, D] of a noised trajectory [..., H, D] at a timestep [...]."""
    return DiffusionTransformer(config).apply({"params": params}, z, actions, noised, timestep)


def rollout(params: Params, z: Array, actions: Array, *, config: ModelConfig) -> Array:
    """MLP rollout [..., H, D] from z [..., D] under action chunks [..., H, C * A]."""

    def step(z, chunk):
        z = MLPDynamics(config).apply({"params": params}, z, chunk)
        return z, z

    _, trajectory = jax.lax.scan(step, z, jnp.moveaxis(actions, -2, 0))
    return jnp.moveaxis(trajectory, 0, -2)


def imagine(
    params: Params, z: Array, actions: Array, noise: Array, *, config: ModelConfig, steps: int
) -> Array:
    """Imagined latents [..., H, D] that follow z under a sequence of action chunks.

    Args:
        params: parameters of the dynamics.
        z: [..., D] latent to start from.
        actions: [..., H, C * A] action chunks.
        noise: [..., H, D] standard normal start of the diffusion; the MLP ignores it.
        config: the model's configuration.
        steps: DDIM steps; the MLP ignores it.
    """
    if config.dynamics == "mlp":
        return rollout(params, z, actions, config=config)

    def velocity_fn(noised, timestep):
        # The sampler keeps its own precision, whatever the network computes in.
        answer = velocity(params, z, actions, noised.astype(z.dtype), timestep, config=config)
        return answer.astype(noised.dtype)

    return diffusion.ddim(velocity_fn, noise, steps=steps, timesteps=config.diffusion_timesteps)


def training_prediction(
    params: Params,
    z: Array,
    actions: Array,
    targets: Array,
    valid: Array,
    draws: Draws,
    *,
    config: ModelConfig,
) -> tuple[Array, Array]:
    """Dynamics loss [] and the predicted latents [B, H, D] that the heads are trained on.

    Diffusion: mean squared error of the velocity at a random timestep, and the one-step denoised
    estimate (equations 1 and 7). MLP: mean squared error of the rollout, and the rollout.

    Args:
        params: parameters of the dynamics.
        z: [B, D] online latent of the first observation.
        actions: [B, H, C * A] action chunks.
        targets: [B, H, D] EMA latents of the H observations that follow.
        valid: [B, H] 1 where the target is not padding, else 0.
        draws: noise and timesteps of this update.
        config: the model's configuration.
    """
    if config.dynamics == "mlp":
        predicted = rollout(params, z, actions, config=config)
        return masked_mean((predicted - targets) ** 2, valid[..., None]), predicted

    alpha_bar = jnp.asarray(diffusion.alpha_bars(config.diffusion_timesteps))
    alpha_bar = alpha_bar[draws.timesteps][:, None, None]
    noised = diffusion.add_noise(targets, draws.noise, alpha_bar)
    target = diffusion.velocity_target(targets, draws.noise, alpha_bar)
    predicted = velocity(params, z, actions, noised, draws.timesteps, config=config)
    loss = masked_mean((predicted - target) ** 2, valid[..., None])
    return loss, diffusion.denoise(noised, predicted, alpha_bar)


def masked_mean(x: Array, valid: Array) -> Array:
    """Mean [] of x over the entries where ``valid``, which broadcasts against it, is 1."""
    valid = jnp.broadcast_to(valid, x.shape)
    return jnp.sum(x * valid) / jnp.sum(valid)
