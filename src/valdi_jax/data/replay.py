"""Replay buffer: a ring of whole episodes, sampled as training segments (paper, Table 3)."""

from __future__ import annotations

import jax
import numpy as np
from flax import struct

from valdi_jax.config import Config
from valdi_jax.data.episode import Episode
from valdi_jax.observation import Observation
from valdi_jax.types import Array, Batch


class Segments(struct.PyTreeNode):
    """Positions of a batch's segments in the replay buffer."""

    slots: Array | np.ndarray  # [B] int32, ring slots of their episodes
    frames: Array | np.ndarray  # [B, H + 2] int32, of their observations within the episode
    steps: Array | np.ndarray  # [B, (H + 1) * C] int32, of actions and rewards within the episode
    within: Array | np.ndarray  # [B, (H + 1) * C] float32, 0 beyond a terminal state
    terminals: Array | np.ndarray  # [B, H + 1] float32, 1 if terminated within the chunk


class Replay:
    """The last ``config.replay.capacity`` episodes, in memory.

    A full CarRacing episode takes 16.6 MB and the paper's thousand 16.6 GB; a third of that if only
    the frames that the planner sees are kept.
    """

    def __init__(self, config: Config):
        self._config = config
        self._ring: list[Episode] = []
        self._places = np.zeros(config.replay.capacity, np.int64)  # starts of segments, by slot
        self._oldest = 0  # slot of the oldest episode

    def add(self, episode: Episode) -> int:
        """Append an episode, replacing the oldest if full; returns its slot in the ring."""
        if len(self._ring) < self._config.replay.capacity:
            slot = len(self._ring)
            self._ring.append(episode)
        else:
            slot = self._oldest
            self._ring[slot] = episode
            self._oldest = (slot + 1) % len(self._ring)
        self._places[slot] = self._starts(episode)
        return slot

    def __len__(self) -> int:
        return len(self._ring)

    @property
    def ready(self) -> bool:
        """Whether there is any segment to draw."""
        return bool(self._places.any())

    def _starts(self, episode: Episode) -> int:
        """Number of frames at which a segment of an episode can start.

        Segments lie within their episode. If the TD target stops at terminal states, segments of a
        terminated episode may reach beyond its end, so that its last steps are drawn as often as
        the others, however short it is.
        """
        if episode.terminated and not self._config.learn.bootstrap_terminal:
            steps = len(episode)
        else:
            steps = max(0, len(episode) - self._config.segment_steps + 1)
        return -(-steps // self._config.frame_stride)

    def draw(self, rng: np.random.Generator, batch_size: int) -> Segments:
        """Draw B segments, uniformly over episodes or over start frames (``replay.sampling``).

        The same state of ``rng`` gives the same segments.

        Raises:
            ValueError: if no episode is long enough to hold a segment.
        """
        model, span = self._config.model, self._config.segment_steps
        stride, count = self._config.frame_stride, len(self._ring)
        oldest_first = (self._oldest + np.arange(count)) % max(count, 1)
        places = self._places[oldest_first]
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
        slots = oldest_first[chosen]
        drawn = [self._ring[slot] for slot in slots]
        ends = np.array([len(episode) for episode in drawn])
        terminated = np.array([episode.terminated for episode in drawn])
        steps = starts[:, None] + np.arange(span)
        frames = starts[:, None] + np.arange(model.horizon + 2) * model.chunk
        last = (steps == ends[:, None] - 1) & terminated[:, None]
        return Segments(
            slots=slots.astype(np.int32),
            # The last frame is the episode's last, even between two strides.
            frames=-(-np.minimum(frames, ends[:, None]) // stride).astype(np.int32),
            steps=np.minimum(steps, ends[:, None] - 1).astype(np.int32),
            within=(steps < ends[:, None]).astype(np.float32),
            terminals=last.reshape(batch_size, model.horizon + 1, model.chunk)
            .any(axis=-1)
            .astype(np.float32),
        )

    def gather(self, segments: Segments) -> Batch:
        """The segments' data. Beyond an end the last observation repeats, all else is 0."""
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
    """Batch of segments, with actions and rewards beyond an episode's end set to 0."""
    lead = segments.terminals.shape
    return Batch(
        observations=observations,
        actions=(actions * segments.within[..., None]).reshape(*lead, -1),
        rewards=(rewards * segments.within).reshape(*lead, -1),
        terminals=segments.terminals,
    )
