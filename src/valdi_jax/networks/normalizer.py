"""Running mean and variance of vector observations.

The statistics live among the parameters, so that whoever has the parameters can plan; no gradient
flows into them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax.networks.layers import on_last_axis
from valdi_jax.types import Array, Params

_LIMIT = 10.0  # standard deviations to clip at: nothing rare may swamp the rest
_TINY = 1e-8  # variance of an input that never varies


def init_normalizer(size: int) -> Params:
    """Statistics of no observation yet: they leave a vector of ``size`` as it is."""
    return {
        "count": jnp.zeros(()),
        "mean": jnp.zeros((size,)),
        "variance": jnp.ones((size,)),
    }


def merge(statistics: Params, vectors: np.ndarray) -> Params:
    """Statistics that also cover ``vectors`` [n, size], on the host (Chan et al., 1979)."""
    count, mean, variance = (
        np.asarray(statistics[name], np.float64) for name in ("count", "mean", "variance")
    )
    vectors = vectors.astype(np.float64)
    total = count + len(vectors)
    share = len(vectors) / total
    shift = vectors.mean(axis=0) - mean
    merged = {
        "count": total,
        "mean": mean + shift * share,
        "variance": (1 - share) * variance
        + share * vectors.var(axis=0)
        + share * (1 - share) * shift**2,
    }
    return {name: jnp.asarray(value, jnp.float32) for name, value in merged.items()}


def normalize(statistics: Params, vector: Array) -> Array:
    """Vector [..., size] in standard deviations from the mean, clipped."""
    statistics = jax.lax.stop_gradient(statistics)
    mean = on_last_axis(statistics["mean"], vector)
    deviation = on_last_axis(jnp.sqrt(statistics["variance"] + _TINY), vector)
    return jnp.clip((vector - mean) / deviation, -_LIMIT, _LIMIT)
