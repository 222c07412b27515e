"""The rectified-flow world model of the authors' code (Liu et al., 2022).

Time t runs from 0 (noise) to 1 (data): x_t = (1 - t) noise + t data. The network regresses the
velocity u = data - noise; its estimate of the data is x_t + (1 - t) u.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax.config import ModelConfig
from valdi_jax.dynamics.base import Dynamics, dummies, masked_mean
from valdi_jax.networks.layers import Linear, apply, initialise
from valdi_jax.networks.transformer import TrajectoryTransformer
from valdi_jax.types import Array, Params

_HIGHEST_FREQUENCY = 1000.0


class FlowDraws(NamedTuple):
    """Random draws of one update."""

    noise: Array  # [B, H, D] standard normal
    times: Array  # [B] float32, uniform on [0, 1)


def frequencies(count: int) -> np.ndarray:
    """Frequencies [count] float32 from 1 to 1000 in geometric progression.

    Bitwise those of the reference: rounding the highest shifts its features by 2e-3.
    """
    last = np.float32(math.log(_HIGHEST_FREQUENCY))
    logarithms = _linspace(float(last), float(np.float32(last / max(count - 1, 1))), count)
    return np.exp(logarithms.astype(np.float64)).astype(np.float32)


def euler_times(steps: int) -> np.ndarray:
    """Times [steps + 1] float32 of Euler's method, from 0 to 1."""
    return _linspace(1.0, float(np.float32(1 / steps)), steps + 1)


def _linspace(last: float, step: float, count: int) -> np.ndarray:
    """0 .. ``last`` in ``count`` values; the upper half counts back from the end."""
    index = np.arange(count)
    values = np.where(index < count // 2, index * step, last - (count - 1 - index) * step)
    return values.astype(np.float32)


def time_features(time: Array, dim: int) -> Array:
    """Sines and cosines [..., dim] of a time [...] in [0, 1)."""
    angles = time[..., None] * frequencies(dim // 2).reshape((1,) * time.ndim + (-1,))
    angles = angles * 2 * np.float32(np.pi)  # in this order, to round as the reference does
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class TimeEmbedding(nn.Module):
    """Time [...] -> embedding [..., features]: Fourier features behind an MLP with SiLU."""

    features: int

    @nn.compact
    def __call__(self, time: Array) -> Array:
        x = Linear(self.features, name="linear_0")(time_features(time, self.features))
        return Linear(self.features, name="linear_1")(nn.silu(x))


class FlowTransformer(TrajectoryTransformer):
    """The transformer with Fourier features of the time [...] in [0, 1)."""

    def embed_time(self, time: Array) -> Array:
        return TimeEmbedding(self.config.timestep_dim, name="time_embedding")(time)


def init(key: Array, *, config: ModelConfig) -> Params:
    """Parameters of the transformer and the time embedding."""
    z, actions = dummies(config)
    noised = np.zeros((1, config.horizon, config.latent_dim), np.float32)
    return initialise(FlowTransformer(config), key, z, actions, noised, np.zeros(1, np.float32))


def draw(keys: Array, batch_size: int, *, config: ModelConfig) -> FlowDraws:
    """Noise and times for ``batch_size`` segments from [2] keys."""
    noise = jax.random.normal(keys[0], (batch_size, config.horizon, config.latent_dim))
    return FlowDraws(noise, jax.random.uniform(keys[1], (batch_size,)))


def velocity(
    params: Params, z: Array, actions: Array, noised: Array, time: Array, *, config: ModelConfig
) -> Array:
    """Velocity [..., H, D] of a noised trajectory [..., H, D] at a time [...] in [0, 1)."""
    return apply(FlowTransformer(config), params, z, actions, noised, time)


def predict(
    params: Params,
    z: Array,
    actions: Array,
    targets: Array,
    valid: Array,
    draws: FlowDraws,
    *,
    config: ModelConfig,
) -> tuple[Array, Array]:
    """Mean squared error of the velocity, and the estimate of the data; shapes as in `Dynamics`."""
    time = draws.times[:, None, None]
    noised = (1 - time) * draws.noise + time * targets
    predicted = velocity(params, z, actions, noised, draws.times, config=config)
    loss = masked_mean((predicted - (targets - draws.noise)) ** 2, valid[..., None])
    return loss, noised + (1 - time) * predicted


def imagine(
    params: Params, z: Array, actions: Array, noise: Array, *, config: ModelConfig, steps: int
) -> Array:
    """Latents that follow z, by Euler's method from ``noise``; shapes as in `Dynamics`."""
    times = jnp.asarray(euler_times(steps))

    def step(sample: Array, interval: tuple[Array, Array]) -> tuple[Array, None]:
        here, there = interval
        noised = sample.astype(z.dtype)  # the sampler keeps its own precision
        answer = velocity(params, z, actions, noised, here, config=config)
        return sample + (there - here) * answer.astype(sample.dtype), None

    sample, _ = jax.lax.scan(step, noise, (times[:-1], times[1:]))
    return sample


DYNAMICS = Dynamics(init, draw, predict, imagine)
