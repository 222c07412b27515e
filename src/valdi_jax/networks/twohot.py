"""Scalars as distributions over bins in symlog space (Hafner et al., 2023; Hansen et al., 2024)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from valdi_jax.types import Array

_LIMIT = 10.0  # of the outermost bins, in symlog space: +-22,025


def symlog(x: Array) -> Array:
    """Sign(x) ln(1 + |x|)."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x: Array) -> Array:
    """The inverse of `symlog`."""
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


def two_hot(x: Array, bins: int) -> Array:
    """Weights [..., bins] of the two bins nearest to each scalar [...]."""
    position = (jnp.clip(symlog(x), -_LIMIT, _LIMIT) + _LIMIT) * (bins - 1) / (2 * _LIMIT)
    distance = jnp.abs(position[..., None] - _along_last(jnp.arange(bins), x.ndim))
    return jnp.maximum(1 - distance, 0)


def decode(logits: Array) -> Array:
    """Scalar [...] of logits [..., bins]: symexp of the mean bin, in float32."""
    bins = jnp.linspace(-_LIMIT, _LIMIT, logits.shape[-1])
    return symexp(jax.nn.softmax(logits.astype(jnp.float32)) @ bins)


def cross_entropy(logits: Array, target: Array) -> Array:
    """Cross entropy [...] of logits [..., bins] to scalars [...]."""
    return -jnp.sum(two_hot(target, logits.shape[-1]) * jax.nn.log_softmax(logits), axis=-1)


def _along_last(vector: Array, lead: int) -> Array:
    return vector.reshape((1,) * lead + (-1,))
