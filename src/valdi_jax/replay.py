"""Trajectory ring buffer: whole episodes in, training segments out (paper, Table 3).

`Replay` keeps the episodes on the host and decides what is drawn. A `Store` is a copy of them on
the device, from which the same segments can be gathered within a compiled update.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from valdi_jax.config import Config
from valdi_jax.errors import UsageError
from valdi_jax.types import Array, Batch, Observation


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode of L environment steps, as it happened.

    Its F observations are the first, every ``config.frame_stride``-th that followed, and the last.
    """

    observations: Observation  # [F, ...]
    actions: np.ndarray  # [L, A] float32
    rewards: np.ndarray  # [L] float32
    terminated: bool  # it ended in a terminal state
    truncated: bool  # it was cut off by a limit
    seed: int  # the environment was reset with

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def episode_return(self) -> float:
        """Undiscounted sum of the rewards."""
        return float(np.sum(self.rewards, dtype=np.float64))


@struct.dataclass
class Segments:
    """Where the segments of a batch lie."""

    slots: Array  # [B] int32, of their episodes in the ring
    frames: Array  # [B, H + 2] int32, of their observations within the episode
    steps: Array  # [B, (H + 1) * C] int32, of their actions and rewards within the episode
    within: Array  # [B, (H + 1) * C] float32, 0 beyond a terminal state
    terminals: Array  # [B, H + 1] float32, 1 where the episode terminated within the chunk


class Replay:
    """The last ``config.replay.capacity`` episodes, in memory.

    A full CarRacing episode takes 16.6 MB, the paper's thousand of them 16.6 GB; a third where only
    the frames that the planner sees are drawn.
    """

    def __init__(self, config: Config):
        self._config = config
        self._ring: list[Episode] = []
        self._oldest = 0  # its slot

    def add(self, episode: Episode) -> int:
        """Append an episode; the oldest leaves when the buffer is full.

        Returns: the slot of the ring that it took.
        """
        if len(self._ring) < self._config.replay.capacity:
            self._ring.append(episode)
            return len(self._ring) - 1
        slot = self._oldest
        self._ring[slot] = episode
        self._oldest = (slot + 1) % len(self._ring)
        return slot

    def __len__(self) -> int:
        return len(self._ring)

    @property
    def ready(self) -> bool:
        """Whether there is any segment to draw."""
        return any(self._starts(episode) for episode in self._ring)

    def _starts(self, episode: Episode) -> int:
        """How many places a segment of an episode can start at, each a frame.

        A segment fits within its episode, unless that ends in a terminal state that the TD target
        stops at: such a segment may reach beyond the end, so that the last steps are learnt from as
        often as the others, however short the episode is.
        """
        if episode.terminated and not self._config.learn.bootstrap_terminal:
            steps = len(episode)
        else:
            steps = max(0, len(episode) - self._config.segment_steps + 1)
        return -(-steps // self._config.frame_stride)

    def draw(self, rng: np.random.Generator, batch_size: int) -> Segments:
        """Draw segments, evenly from episodes or from places to start (``replay.sampling``).

        Args:
            rng: source of the draws; the same state gives the same segments.
            batch_size: segments B.

        Raises:
            ValueError: if no episode is long enough to hold a segment.
        """
        model, span = self._config.model, self._config.segment_steps
        stride, count = self._config.frame_stride, len(self._ring)
        oldest_first = [(self._oldest + i) % count for i in range(count)]
        places = np.array([self._starts(self._ring[slot]) for slot in oldest_first])
        eligible = np.flatnonzero(places)
        if not eligible.size:
            raise ValueError(f"no episode of at least {span} steps to sample from")
        if self._config.replay.sampling == "episode":
            chosen = eligible[rng.integers(len(eligible), size=batch_size)]
            starts = stride * rng.integers(places[chosen])
        else:
            ends_of = np.cumsum(places)
            drawn_places = rng.integers(ends_of[-1], size=batch_size)
            chosen = np.searchsorted(ends_of, drawn_places, side="right")
            starts = stride * (drawn_places - (ends_of - places)[chosen])
        slots = np.array(oldest_first)[chosen]
        drawn = [self._ring[slot] for slot in slots]
        ends = np.array([len(episode) for episode in drawn])
        terminated = np.array([episode.terminated for episode in drawn])
        steps = starts[:, None] + np.arange(span)
        frames = starts[:, None] + np.arange(model.horizon + 2) * model.chunk
        last = (steps == ends[:, None] - 1) & terminated[:, None]
        return Segments(
            slots=slots.astype(np.int32),
            # The last frame is that of the end, even where it ends between two strides.
            frames=-(-np.minimum(frames, ends[:, None]) // stride).astype(np.int32),
            steps=np.minimum(steps, ends[:, None] - 1).astype(np.int32),
            within=(steps < ends[:, None]).astype(np.float32),
            terminals=last.reshape(batch_size, model.horizon + 1, model.chunk)
            .any(axis=-1)
            .astype(np.float32),
        )

    def gather(self, segments: Segments) -> Batch:
        """The segments' data. Beyond an end the last observation is repeated, all else is 0."""
        drawn = [self._ring[slot] for slot in segments.slots]

        def stack(arrays: list[np.ndarray], indices: np.ndarray) -> np.ndarray:
            return np.stack([array[i] for array, i in zip(arrays, indices, strict=True)])

        # A missing modality is an empty tree.
        observations = jax.tree.map(
            lambda *arrays: stack(list(arrays), segments.frames),
            *(episode.observations for episode in drawn),
        )
        actions = stack([episode.actions for episode in drawn], segments.steps)
        rewards = stack([episode.rewards for episode in drawn], segments.steps)
        return _batch(observations, actions, rewards, segments)


def _batch(observations: Observation, actions: Array, rewards: Array, segments: Segments) -> Batch:
    lead = segments.terminals.shape
    return Batch(
        observations=observations,
        actions=(actions * segments.within[..., None]).reshape(*lead, -1),
        rewards=(rewards * segments.within).reshape(*lead, -1),
        terminals=segments.terminals,
    )


@struct.dataclass
class Store:
    """A replay's episodes on the device, each in its slot E, padded to the longest possible."""

    observations: Observation  # [E, F, ...], images in uint8
    actions: Array  # [E, L, A]
    rewards: Array  # [E, L]


def store_shapes(example: Observation, config: Config) -> Store:
    """Shapes and dtypes of a run's store.

    Args:
        example: one observation, without a batch axis.
        config: the run's configuration.

    Raises:
        UsageError: if its episodes have no known limit.
    """
    length = config.episode_steps
    if not length:
        raise UsageError(
            "--replay.placement device has to know how long an episode can be: give "
            "--env.max-steps, or --replay.placement host"
        )
    slots = min(config.replay.capacity, config.collect.episodes)
    frames = -(-length // config.frame_stride) + 1
    return Store(
        observations=jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((slots, frames, *x.shape), x.dtype), example
        ),
        actions=jax.ShapeDtypeStruct((slots, length, config.model.action_dim), jnp.float32),
        rewards=jax.ShapeDtypeStruct((slots, length), jnp.float32),
    )


def store_episode(store: Store, slot: int, episode: Episode) -> Store:
    """Put an episode into a slot. The store given is donated: use the one returned.

    Raises:
        UsageError: if the episode is longer than the store's.
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
    """`Replay.gather` from a store, to be compiled into an update."""
    slots = segments.slots[:, None]
    return _batch(
        jax.tree.map(lambda x: x[slots, segments.frames], store.observations),
        store.actions[slots, segments.steps],
        store.rewards[slots, segments.steps],
        segments,
    )
