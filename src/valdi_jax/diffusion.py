"""Noise schedule, v-prediction and DDIM sampler (paper, Supp. A.2)."""

from __future__ import annotations

import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax.types import Array


def alpha_bars(timesteps: int) -> np.ndarray:
    """Cumulative products of 1 - beta for the linear schedule, [T] float32 (equation 8)."""
    betas = np.linspace(1e-4, 2e-2, timesteps)
    return np.cumprod(1 - betas).astype(np.float32)


def add_noise(clean: Array, noise: Array, alpha_bar: Array) -> Array:
    """Noised sample [...] from a clean one [...] and noise [...]; alpha_bar broadcasts to [...]."""
    chex.assert_equal_shape([clean, noise])
    return jnp.sqrt(alpha_bar) * clean + jnp.sqrt(1 - alpha_bar) * noise


def velocity_target(clean: Array, noise: Array, alpha_bar: Array) -> Array:
    """Regression target [...] of the network (equation 7); shapes as in `add_noise`."""
    chex.assert_equal_shape([clean, noise])
    return jnp.sqrt(alpha_bar) * noise - jnp.sqrt(1 - alpha_bar) * clean


def denoise(noised: Array, velocity: Array, alpha_bar: Array) -> Array:
    """One-step estimate [...] of the clean sample (equation 1); shapes as in `add_noise`."""
    chex.assert_equal_shape([noised, velocity])
    return jnp.sqrt(alpha_bar) * noised - jnp.sqrt(1 - alpha_bar) * velocity


def ddim_timesteps(steps: int, timesteps: int) -> list[int]:
    """The ``steps`` timesteps that DDIM visits, descending from T - 1.

    Raises:
        ValueError: if ``steps`` is not in 1 .. T.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"diffusion_steps is {steps}; it must be between 1 and {timesteps}")
    return [math.ceil(k * timesteps / steps) - 1 for k in range(steps, 0, -1)]


def ddim(
    velocity_fn: Callable[[Array, Array], Array], noise: Array, *, steps: int, timesteps: int
) -> Array:
    """Deterministic DDIM (Song et al., 2020) from ``noise`` to a clean sample.

    Args:
        velocity_fn: (sample [...], timestep [] int32) -> velocity [...].
        noise: [...] standard normal.
        steps: network evaluations, 1 .. T.
        timesteps: T of the schedule.
    """
    visited = ddim_timesteps(steps, timesteps)
    schedule = alpha_bars(timesteps)
    here = schedule[visited]
    # alpha_bar = 1 after the last step, which therefore returns the clean estimate.
    there = np.append(here[1:], np.float32(1))

    def step(sample, inputs):
        timestep, alpha_bar, next_alpha_bar = inputs
        velocity = velocity_fn(sample, timestep)
        clean = denoise(sample, velocity, alpha_bar)
        noise = jnp.sqrt(1 - alpha_bar) * sample + jnp.sqrt(alpha_bar) * velocity
        return add_noise(clean, noise, next_alpha_bar), None

    inputs = (jnp.asarray(visited, jnp.int32), jnp.asarray(here), jnp.asarray(there))
    sample, _ = jax.lax.scan(step, noise, inputs)
    return sample
