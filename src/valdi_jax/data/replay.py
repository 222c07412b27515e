"""Trajectory ring buffer: whole episodes in, training segments out (paper, Table 3)."""

from __future__ import annotations

import jax
import numpy as np
from flax import struct

from valdi_jax.config import Config
from valdi_jax.data.episode import Episode
from valdi_jax.observation import Observation
from valdi_jax.types import Array, Batch


class Segments(struct.PyTreeNode):
    """Where the segments of a batch lie."""

    slots: Array | np.ndarray  # [B] int32, of their episodes in the ring
    frames: Array | np.ndarray  # [B, H + 2] int32, of their observations within the episode
    steps: Array | np.ndarray  # [B, (H + 1) * C] int32, of actions and rewards within the episode
    within: Array | np.ndarray  # [B, (H + 1) * C] float32, 0 beyond a terminal state
    terminals: Array | np.ndarray  # [B, H + 1] float32, 1 where it terminated within the chunk


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

        def stack(arrays: list[np.ndarray], indices: Array | np.ndarray) -> np.ndarray:
            return np.stack([array[i] for array, i in zip(arrays, indices, strict=True)])

        # A missing modality is an empty tree.
        observations = jax.tree.map(
            lambda *arrays: stack(list(arrays), segments.frames),
            *(episode.observations for episode in drawn),
        )
        actions = stack([episode.actions for episode in drawn], segments.steps)
        rewards = stack([episode.rewards for episode in drawn], segments.steps)
        return batch_of(observations, actions, rewards, segments)


def batch_of(
    observations: Observation,
    actions: Array | np.ndarray,
    rewards: Array | np.ndarray,
    segments: Segments,
) -> Batch:
    """The data of segments, of which what lies beyond an end becomes 0."""
    lead = segments.terminals.shape
    return Batch(
        observations=observations,
        actions=(actions * segments.within[..., None]).reshape(*lead, -1),
        rewards=(rewards * segments.within).reshape(*lead, -1),
        terminals=segments.terminals,
    )
