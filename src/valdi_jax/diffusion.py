"""Noise schedules and samplers: v-prediction and DDIM (paper, Supp. A.2), Diffuser's guidance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

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


class Posterior(NamedTuple):
    """The reverse process of the cosine schedule (Nichol & Dhariwal, 2021), [T] each."""

    alpha_bars: np.ndarray
    variance: np.ndarray  # of x_{i-1} given x_i and the clean sample
    clean: np.ndarray  # the mean's factor on the clean sample
    noised: np.ndarray  # the mean's factor on x_i


def cosine_posterior(timesteps: int) -> Posterior:
    """The posterior of T timesteps, in float32."""
    angles = (np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2
    alpha_bars = np.cos(angles) ** 2
    betas = np.clip(1 - alpha_bars[1:] / alpha_bars[:-1], 0, 0.999).astype(np.float32)
    alpha_bars = np.cumprod(1 - betas)
    before = np.append(np.float32(1), alpha_bars[:-1])
    return Posterior(
        alpha_bars=alpha_bars,
        variance=betas * (1 - before) / (1 - alpha_bars),
        clean=betas * np.sqrt(before) / (1 - alpha_bars),
        noised=(1 - before) * np.sqrt(1 - betas) / (1 - alpha_bars),
    )


class Guide(NamedTuple):
    """A value that steers a sampler (Janner et al., 2022)."""

    value: Callable[[Array, Array], Array]  # (samples [N, ...], timestep [] int32) -> [N]
    scale: float | Array  # factor on its gradient, besides the posterior variance
    steps: int  # along the gradient, at each timestep
    stop: int  # no guidance below this timestep


def guided_sample(
    denoise_fn: Callable[[Array, Array], Array],
    noise: Array,
    pin: Callable[[Array], Array],
    *,
    posterior: Posterior,
    guide: Guide | None = None,
) -> tuple[Array, Array]:
    """Ancestral sampling with some entries pinned, steered by a value (Janner et al., 2022).

    Each timestep moves the samples along the value's gradient, then denoises them.

    Args:
        denoise_fn: (samples [N, ...], timestep [] int32) -> estimate of the clean samples.
        noise: [K + 1, N, ...] standard normal: the start, then one draw for each timestep from
            K - 1 to 0, of which the last is not used. K = T starts from noise; with fewer, noise[0]
            is a sample noised to timestep K - 1.
        pin: overwrites the entries of a sample that are known.
        posterior: of T timesteps.
        guide: none for plain sampling.

    Returns: samples [N, ...], and their values [N] before the last denoising (0 without a guide; of
    the samples themselves with one of 0 steps).
    """

    def step(carry: tuple[Array, Array], inputs: Any) -> tuple[tuple[Array, Array], None]:
        timestep, draw = inputs
        return guided_step(
            denoise_fn, carry[0], timestep, draw, pin, posterior=posterior, guide=guide
        ), None

    timesteps = jnp.arange(noise.shape[0] - 2, -1, -1, dtype=jnp.int32)
    start = pin(noise[0]), jnp.zeros(noise.shape[1])
    samples, values = jax.lax.scan(step, start, (timesteps, noise[1:]))[0]
    if guide is not None and guide.steps == 0:  # no guidance, but values to choose by
        values = guide.value(samples, jnp.zeros((), jnp.int32))
    return samples, values


def guided_step(
    denoise_fn: Callable[[Array, Array], Array],
    samples: Array,
    timestep: Array,
    draw: Array,
    pin: Callable[[Array], Array],
    *,
    posterior: Posterior,
    guide: Guide | None,
) -> tuple[Array, Array]:
    """One timestep of `guided_sample`: samples [N, ...] at the next, and their values [N]."""
    at = jax.tree.map(lambda x: jnp.asarray(x)[timestep], posterior)
    values = jnp.zeros(samples.shape[0])
    if guide is not None:
        samples, values = climb(samples, timestep, at.variance, pin, guide=guide)
    clean = denoise_fn(samples, timestep)
    mean = at.clean * clean + at.noised * samples
    return pin(mean + jnp.where(timestep > 0, jnp.sqrt(at.variance), 0) * draw), values


def climb(
    samples: Array, timestep: Array, variance: Array, pin: Callable[[Array], Array], *, guide: Guide
) -> tuple[Array, Array]:
    """Steps along the gradient of a guide's value; the values before the last."""

    def value(samples: Array) -> tuple[Array, Array]:
        values = guide.value(samples, timestep)
        return values.sum(), values

    def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        gradient, values = jax.grad(value, has_aux=True)(carry[0])
        gradient = jnp.where(timestep < guide.stop, 0, variance * gradient)
        return (pin(carry[0] + guide.scale * gradient), values), None

    start = samples, jnp.zeros(samples.shape[0])
    return jax.lax.scan(step, start, length=guide.steps)[0]
