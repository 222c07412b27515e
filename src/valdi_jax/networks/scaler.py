"""Diffuser's normalisers of states and actions, fitted once on recorded data."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax.networks.layers import on_last_axis
from valdi_jax.types import Array

_TOLERANCE = 1e-4  # beyond [-1, 1], before the limits' inverse clips
_MOST_POINTS = 4096  # of a distribution function

Scaler = dict[str, np.ndarray]


def init_scaler(kind: str, size: int) -> Scaler:
    """Statistics before any data: they leave what is in [-1, 1] unchanged."""
    if kind == "cdf":
        ramp = np.linspace(0, 1, _MOST_POINTS, dtype=np.float32)[:, None]
        return {
            "values": np.repeat(2 * ramp - 1, size, axis=1),
            "probabilities": np.repeat(ramp, size, axis=1),
        }
    return {"center": np.zeros(size, np.float32), "scale": np.ones(size, np.float32)}


def fit(kind: str, data: np.ndarray) -> Scaler:
    """Statistics of data [n, D].

    gaussian: mean and standard deviation. limits: to [-1, 1]. safe-limits: the same, but every
    constant dimension widens the limits of all by 1. cdf: the empirical distribution function to
    [-1, 1]; of more than 4096 different values, so many.
    """
    data = np.asarray(data, np.float32)
    if kind == "gaussian":
        # In float64: in float32, the sums of millions of rows are off.
        moments = {"center": data.mean(axis=0, dtype=float), "scale": data.std(axis=0, dtype=float)}
        return {name: moment.astype(np.float32) for name, moment in moments.items()}
    if kind == "cdf":
        points = [_distribution(column) for column in data.T]
        pad = [(0, _MOST_POINTS - len(values)) for values, _ in points]
        return {
            name: np.stack(
                [np.pad(p[i], n, mode="edge") for p, n in zip(points, pad, strict=True)], axis=1
            )
            for i, name in enumerate(("values", "probabilities"))
        }
    low, high = data.min(axis=0), data.max(axis=0)
    if kind == "safe-limits":
        constant = np.float32((low == high).sum())
        low, high = low - constant, high + constant
    return {"center": (low + high) / 2, "scale": (high - low) / 2}


def _distribution(column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, counts = np.unique(column, return_counts=True)
    chosen = np.unique(np.linspace(0, len(values) - 1, _MOST_POINTS).round().astype(int))
    probabilities = np.cumsum(counts) / column.size
    return values[chosen], probabilities[chosen].astype(np.float32)


def scale(scaler: Scaler, x: Array | np.ndarray, *, kind: str) -> Array:
    """Normalise [..., D]."""
    x = jnp.asarray(x)
    if kind == "cdf":
        share = _interpolate(x, scaler["values"], scaler["probabilities"])
        return 2 * share - 1
    return (x - on_last_axis(scaler["center"], x)) / on_last_axis(scaler["scale"], x)


def unscale(scaler: Scaler, x: Array | np.ndarray, *, kind: str) -> Array:
    """The inverse. The limits' clips all entries to [-1, 1] if any is beyond, as the authors do."""
    x = jnp.asarray(x)
    if kind == "cdf":
        return _interpolate((x + 1) / 2, scaler["probabilities"], scaler["values"])
    if kind != "gaussian":
        x = jnp.where(jnp.abs(x).max() > 1 + _TOLERANCE, jnp.clip(x, -1, 1), x)
    return x * on_last_axis(scaler["scale"], x) + on_last_axis(scaler["center"], x)


def _interpolate(x: Array | np.ndarray, points: np.ndarray, values: np.ndarray) -> Array:
    """Piecewise linear functions of each column [..., D], constant beyond their ends."""
    each = jax.vmap(jnp.interp, in_axes=(-1, 1, 1), out_axes=-1)
    return each(jnp.asarray(x), jnp.asarray(points), jnp.asarray(values))
