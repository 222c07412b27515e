"""Augmentation of training segments that leaves the task unchanged."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax.config import Config
from valdi_jax.types import Array, Batch

# Mirrors CarRacing's vector (`envs.carracing.read_proprio`): speed, ABS of the wheels front left,
# front right, rear left, rear right, steering, gyroscope. Of the actions, steering, gas and brake,
# only steering changes its sign.
_MIRRORED = np.array([0, 2, 1, 4, 3, 5, 6])
_SIGNS = np.array([1, 1, 1, 1, 1, -1, -1], np.float32)
_ACTION_SIGNS = np.array([-1, 1, 1], np.float32)


class AugmentDraws(NamedTuple):
    """Random draws of the augmentations; ``None`` for those that are off."""

    mirrored: Array | None = None  # [B] bool, segments to mirror
    shifts: Array | None = None  # [B, 2] int32, shifts in pixels


def draw(keys: Array, batch_size: int, *, config: Config) -> AugmentDraws:
    """Draws for ``learn.mirror`` and ``learn.random_shift`` of B segments, from [2] keys."""
    learn, most = config.learn, config.learn.random_shift
    return AugmentDraws(
        mirrored=jax.random.bernoulli(keys[0], 0.5, (batch_size,)) if learn.mirror else None,
        shifts=jax.random.randint(keys[1], (batch_size, 2), -most, most + 1) if most else None,
    )


def augment(batch: Batch, draws: AugmentDraws) -> Batch:
    """Apply the augmentations in ``draws`` to a batch."""
    if draws.mirrored is not None:
        batch = jax.vmap(lambda x, mirrored: _select(mirrored, mirror(x), x))(batch, draws.mirrored)
    if draws.shifts is not None and batch.observations.image is not None:
        image = jax.vmap(shift)(batch.observations.image, draws.shifts)
        batch = batch.replace(observations=batch.observations._replace(image=image))
    return batch


def mirror(segment: Batch) -> Batch:
    """Mirror a CarRacing segment left to right.

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
    """Shift frames [..., height, width, channels] down and right by [2] pixels, repeating edges.

    DrQ's random shift (Kostrikov et al., 2020), but the same for all frames of a segment, so that
    the dynamics do not change.
    """
    for axis, pixels in zip((-3, -2), by, strict=True):
        size = images.shape[axis]
        source = jnp.clip(jnp.arange(size) - pixels, 0, size - 1)
        images = jnp.take(images, source, axis=axis)
    return images


def _select(condition: Array, one: Batch, other: Batch) -> Batch:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)
