"""Training segments changed in ways that leave the task the same."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax.config import Config
from valdi_jax.types import Array, Batch

# CarRacing's vector (`envs.carracing.read_proprio`) with left and right exchanged: speed, ABS of
# the wheels front left, front right, rear left, rear right, steering, gyroscope. Of its actions,
# steering, gas and brake, only the first has a side.
_MIRRORED = np.array([0, 2, 1, 4, 3, 5, 6])
_SIGNS = np.array([1, 1, 1, 1, 1, -1, -1], np.float32)
_ACTION_SIGNS = np.array([-1, 1, 1], np.float32)


class AugmentDraws(NamedTuple):
    """Which changes are made; ``None`` makes none."""

    mirrored: Array | None = None  # [B] bool, segments whose left and right are exchanged
    shifts: Array | None = None  # [B, 2] int32, pixels that their frames are shifted by


def draw(keys: Array, batch_size: int, *, config: Config) -> AugmentDraws:
    """Changes of ``batch_size`` segments as ``learn.mirror`` and ``learn.random_shift`` ask for.

    Args:
        keys: [2] PRNG keys.
        batch_size: segments B.
        config: the run's configuration.
    """
    learn, most = config.learn, config.learn.random_shift
    return AugmentDraws(
        mirrored=jax.random.bernoulli(keys[0], 0.5, (batch_size,)) if learn.mirror else None,
        shifts=jax.random.randint(keys[1], (batch_size, 2), -most, most + 1) if most else None,
    )


def augment(batch: Batch, draws: AugmentDraws) -> Batch:
    """The batch with the changes that ``draws`` holds."""
    if draws.mirrored is not None:
        batch = jax.vmap(lambda x, mirrored: _select(mirrored, mirror(x), x))(batch, draws.mirrored)
    if draws.shifts is not None and batch.observations.image is not None:
        image = jax.vmap(shift)(batch.observations.image, draws.shifts)
        batch = batch.replace(observations=batch.observations._replace(image=image))
    return batch


def mirror(segment: Batch) -> Batch:
    """A CarRacing segment as on the mirrored track.

    Raises:
        ValueError: if it is of another environment.
    """
    seen, size = segment.observations, len(_MIRRORED)
    if seen.image is None or seen.vector is None or seen.vector.shape[-1] != size:
        raise ValueError(f"only CarRacing's frames and {size} sensors can be mirrored")
    signs = _SIGNS.reshape((1,) * (seen.vector.ndim - 1) + (-1,))
    observations = seen._replace(
        image=seen.image[..., ::-1, :],
        vector=seen.vector[..., _MIRRORED] * signs,
    )
    signs = np.tile(_ACTION_SIGNS, segment.actions.shape[-1] // len(_ACTION_SIGNS))
    actions = segment.actions * signs.reshape((1,) * (segment.actions.ndim - 1) + (-1,))
    return segment.replace(observations=observations, actions=actions)


def shift(images: Array, by: Array) -> Array:
    """Frames [..., height, width, channels] moved down and right by [2] pixels, edges repeated.

    As DrQ's random shifts (Kostrikov et al., 2020), but all frames of a segment alike, so that the
    dynamics stay the same.
    """
    for axis, pixels in zip((-3, -2), by, strict=True):
        size = images.shape[axis]
        source = jnp.clip(jnp.arange(size) - pixels, 0, size - 1)
        images = jnp.take(images, source, axis=axis)
    return images


def _select(condition: Array, one: Batch, other: Batch) -> Batch:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)
