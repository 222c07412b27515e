"""Running mean and variance of vector observations.

They are stored with the parameters, so that planning needs nothing else, and get no gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax.networks.layers import on_last_axis
from valdi_jax.types import Array, Params

_LIMIT = 10.0  # standard deviations to clip at, against outliers
_OUTLIER = 5.0  # times the spread of 99 % of the readings
_LARGEST = 1e15  # its square is finite in float32
_TINY = 1e-8  # added to the variance, for constant inputs


def init_normalizer(size: int) -> Params:
    """Statistics before any observation: they leave a vector [size] unchanged."""
    return {
        "count": jnp.zeros(()),
        "mean": jnp.zeros((size,)),
        "variance": jnp.ones((size,)),
    }


def merge(statistics: Params, vectors: np.ndarray) -> Params:
    """Statistics updated with ``vectors`` [n, size], on the host (Chan et al., 1979)."""
    count, mean, variance = (
        np.asarray(statistics[name], np.float64) for name in ("count", "mean", "variance")
    )
    vectors = _without_outliers(vectors.astype(np.float64))
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


def _without_outliers(vectors: np.ndarray) -> np.ndarray:
    """Vectors [n, size] with extreme readings clipped towards the median.

    A reading of 1e38 would make the variance infinite, and its input constant forever.
    """
    centre = np.median(vectors, axis=0)
    spread = np.quantile(np.abs(vectors - centre), 0.99, axis=0)
    spread = np.where(spread > 0, spread, np.inf)  # no spread: nothing to measure outliers by
    reach = np.minimum(_OUTLIER * spread, _LARGEST)
    return np.clip(vectors, centre - reach, centre + reach)


def normalize(statistics: Params, vector: Array) -> Array:
    """Vector [..., size] in standard deviations from the mean, clipped."""
    statistics = jax.lax.stop_gradient(statistics)
    mean = on_last_axis(statistics["mean"], vector)
    deviation = on_last_axis(jnp.sqrt(statistics["variance"] + _TINY), vector)
    return jnp.clip((vector - mean) / deviation, -_LIMIT, _LIMIT)
