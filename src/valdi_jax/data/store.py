"""Episodes of the replay buffer on the device, where compiled updates gather segments."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from valdi_jax.config import Config
from valdi_jax.data.episode import Episode
from valdi_jax.data.replay import Segments, batch_of
from valdi_jax.errors import UsageError
from valdi_jax.observation import Observation
from valdi_jax.types import Array, Batch


class Store(struct.PyTreeNode):
    """Episodes on the device, one per slot E, padded to the maximum length L."""

    observations: Observation  # [E, F, ...], images in uint8
    actions: Array | np.ndarray  # [E, L, A]
    rewards: Array | np.ndarray  # [E, L]


def store_shapes(example: Observation, config: Config, recorded: Sequence[int] = ()) -> Store:
    """Shapes and dtypes of a run's store.

    Args:
        example: one observation without a batch axis.
        config: the run's configuration.
        recorded: steps of each recorded episode.

    Raises:
        UsageError: if its episodes have no known limit.
    """
    if config.ring_slots and not config.episode_steps:
        raise UsageError(
            "--replay.placement device has to know how long an episode can be: give "
            "--env.max-steps, or --replay.placement host"
        )
    length = max((config.episode_steps if config.ring_slots else 0, *recorded))
    slots = config.ring_slots + len(recorded)
    frames = -(-length // config.frame_stride) + 1
    shape: Any = jax.ShapeDtypeStruct  # Any: it stands for the array of that shape
    return Store(
        observations=jax.tree.map(lambda x: shape((slots, frames, *x.shape), x.dtype), example),
        actions=shape((slots, length, config.model.action_dim), jnp.float32),
        rewards=shape((slots, length), jnp.float32),
    )


def store_episode(store: Store, slot: int, episode: Episode) -> Store:
    """Put an episode into a slot. The store is donated: use the returned one.

    Raises:
        UsageError: if the episode is too long for the store.
    """
    if len(episode) > store.rewards.shape[1]:
        raise UsageError(
            f"an episode took {len(episode)} steps, more than the {store.rewards.shape[1]} that "
            "--env.max-steps allows: --replay.placement host takes any"
        )
    given = Store(episode.observations, episode.actions, episode.rewards)

    def pad(array: np.ndarray, whole: Array) -> np.ndarray:
        padded = np.zeros(whole.shape[1:], whole.dtype)
        padded[: len(array)] = array
        return padded

    return _put(store, np.int32(slot), jax.tree.map(pad, given, store))


@functools.partial(jax.jit, donate_argnums=(0,))
def _put(store: Store, slot: Array, episode: Store) -> Store:
    return jax.tree.map(lambda whole, part: whole.at[slot].set(part), store, episode)


def gather(store: Store, segments: Segments) -> Batch:
    """`Replay.gather` from a store, for compiled updates."""
    slots = segments.slots[:, None]
    return batch_of(
        jax.tree.map(lambda x: x[slots, segments.frames], store.observations),
        store.actions[slots, segments.steps],
        store.rewards[slots, segments.steps],
        segments,
    )
