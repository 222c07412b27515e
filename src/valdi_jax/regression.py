"""How reward and value heads express a number: as one output, or as a distribution over bins.

The paper's heads have one output and a squared error. Where rewards differ by orders of magnitude,
the errors of the large ones drown the small. A two-hot head (Hafner et al., 2023, "Mastering
Diverse Domains through World Models") weighs both alike, and its mean is not biased, as that of a
regression on squashed targets would be.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax.config import HeadKind
from valdi_jax.types import Array

# Evenly spaced in log(1 + |x|), so that they are close at 0 and reach from -1096 to 1096.
_POSITIVE = np.expm1(np.linspace(0, 7, 51)[1:])
BINS = np.concatenate([-_POSITIVE[::-1], [0], _POSITIVE]).astype(np.float32)


def output_size(kind: HeadKind) -> int:
    """Outputs O of a head."""
    return 1 if kind == "scalar" else len(BINS)


def decode(outputs: Array, *, kind: HeadKind) -> Array:
    """The number [...] that outputs [..., O] stand for."""
    if kind == "scalar":
        return outputs[..., 0]
    # Not as a product, which an accelerator may round to TF32.
    return (jax.nn.softmax(outputs.astype(jnp.float32)) * BINS).sum(axis=-1)


def loss(outputs: Array, targets: Array, *, kind: HeadKind) -> Array:
    """Squared error, or cross-entropy with the two-hot target: [..., O], [...] -> [...]."""
    if kind == "scalar":
        return (outputs[..., 0] - targets) ** 2
    log_probabilities = jax.nn.log_softmax(outputs)
    return -(two_hot(targets) * log_probabilities).sum(axis=-1)


def two_hot(x: Array) -> Array:
    """Weights [..., bins] on the two bins around x [...] whose mean is x, or on the outermost."""
    x = jnp.clip(x, BINS[0], BINS[-1])[..., None]
    gaps = np.diff(BINS)
    # A bin's weight falls from 1 to 0 over the gap on either side of it.
    rise = (x - BINS[:-1]) / gaps
    ones = jnp.ones_like(x)
    from_below = jnp.concatenate([ones, rise], axis=-1)
    from_above = jnp.concatenate([1 - rise, ones], axis=-1)
    return jnp.clip(jnp.minimum(from_below, from_above), 0, 1)
