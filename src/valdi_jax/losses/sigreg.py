"""SIGReg: push the latents towards an isotropic Gaussian (Balestriero & LeCun, 2025)."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax.config import Config
from valdi_jax.losses.base import Term, View
from valdi_jax.types import Array, Params


def random_directions(key: Array, dim: int, count: int) -> Array:
    """Random unit columns [dim, count]; a zero draw stays zero instead of becoming NaN."""
    draws = jax.random.normal(key, (dim, count))
    return draws / jnp.maximum(jnp.linalg.norm(draws, axis=0, keepdims=True), 1e-12)


def sigreg(latents: Array, directions: Array, *, knots: int) -> Array:
    """Mean Epps-Pulley statistic over the projections of ``latents`` on ``directions``.

    Compares the empirical characteristic function of each projection with the Gaussian's on [0, 3].
    Its expectation is 1.0525 for Gaussian latents of any batch size, and 0.40205 B for all zeros.

    Args:
        latents: [B, D].
        directions: [D, directions] unit columns.
        knots: points of the trapezoidal rule.

    Returns: [] statistic.
    """
    chex.assert_rank([latents, directions], 2)
    points = np.linspace(0, 3, knots, dtype=np.float32)
    gaussian = np.exp(-(points**2) / 2)
    # Twice the trapezoidal weights: the integrand is even, so [0, 3] stands for [-3, 3].
    weights = np.full(knots, 2 * 3 / (knots - 1), np.float32)
    weights[[0, -1]] /= 2

    angles = (latents @ directions)[..., None] * points[None, None]  # [B, directions, knots]
    real, imaginary = jnp.cos(angles).mean(0), jnp.sin(angles).mean(0)
    error = (real - gaussian[None]) ** 2 + imaginary**2
    statistic = latents.shape[0] * error @ (weights * gaussian)
    return statistic.mean()


def draw(keys: Array, batch_size: int, *, config: Config) -> Array:
    """New directions [D, directions] for every update, from [1] key."""
    return random_directions(keys[0], config.model.latent_dim, config.learn.sigreg_directions)


def loss(
    params: Params, ema_params: Params, view: View, draws: Array, *, config: Config
) -> tuple[Array, dict[str, Array]]:
    """The statistic of the first observations' latents."""
    return sigreg(view.z, draws, knots=config.learn.sigreg_knots), {}


TERM = Term(
    trains=("encoder",),
    weight=lambda config: config.learn.sigreg_weight,
    loss=loss,
    keys=1,
    draw=draw,
)
