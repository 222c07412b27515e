"""Training segments changed in ways that leave the task the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax.types import Array, Batch, Draws

# CarRacing's vector (`envs.carracing.read_proprio`) with left and right exchanged: speed, ABS of
# the wheels front left, front right, rear left, rear right, steering, gyroscope. Of its actions,
# steering, gas and brake, only the first has a side.
_MIRRORED = np.array([0, 2, 1, 4, 3, 5, 6])
_SIGNS = np.array([1, 1, 1, 1, 1, -1, -1], np.float32)
_ACTION_SIGNS = np.array([-1, 1, 1], np.float32)


def augment(batch: Batch, draws: Draws) -> Batch:
    """The batch with the changes that ``draws`` holds; ``None`` there changes nothing."""
    if draws.mirrored is not None:
        batch = jax.vmap(lambda x, mirrored: _select(mirrored, mirror(x), x))(batch, draws.mirrored)
    if draws.shifts is not None and batch.observations.image is not None:
        image = jax.vmap(shift)(batch.observations.image, draws.shifts)
        batch = batch.replace(observations=batch.observations.replace(image=image))
    return batch


def mirror(segment: Batch) -> Batch:
    """A CarRacing segment driven on the mirrored track.

    Raises:
        ValueError: if it is of another environment.
    """
    seen, size = segment.observations, len(_MIRRORED)
    if seen.image is None or seen.vector is None or seen.vector.shape[-1] != size:
        raise ValueError(f"only CarRacing's frames and {size} sensors can be mirrored")
    observations = seen.replace(
        image=seen.image[..., ::-1, :],
        vector=seen.vector[..., _MIRRORED] * _SIGNS,
    )
    chunks = segment.actions.reshape(*segment.actions.shape[:-1], -1, len(_ACTION_SIGNS))
    actions = (chunks * _ACTION_SIGNS).reshape(segment.actions.shape)
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
