"""Replay buffer: a ring of whole episodes, sampled as training segments (paper, Table 3)."""

from __future__ import annotations

import sys

import jax
import numpy as np
from flax import struct

from valdi_jax.config import Config
from valdi_jax.data.episode import Episode
from valdi_jax.data.windows import window_count
from valdi_jax.observation import Observation
from valdi_jax.types import Array, Batch


class Segments(struct.PyTreeNode):
    """Positions of a batch's segments in the replay buffer."""

    slots: Array | np.ndarray  # [B] int32, ring slots of their episodes
    frames: Array | np.ndarray  # [B, H + 2] int32, of their observations within the episode
    steps: Array | np.ndarray  # [B, (H + 1) * C] int32, of actions and rewards within the episode
    within: Array | np.ndarray  # [B, (H + 1) * C] float32, 0 beyond the episode's end
    terminals: Array | np.ndarray  # [B, H + 1] float32, 1 if terminated within the chunk


class Replay:
    """The last ``config.replay.capacity`` episodes, and recorded ones, in memory.

    A full CarRacing episode takes 16.6 MB and the paper's thousand 16.6 GB; a third of that if only
    the frames that the planner sees are kept.

    Args:
        config: the run's configuration.
        longest: steps of the longest recorded episode; 0 if there is none.
    """

    def __init__(self, config: Config, *, longest: int = 0):
        self._config = config
        self._own = _Ring(config.replay.capacity)
        self._recorded = _Ring()
        self._longest = longest

    def add(self, episode: Episode) -> int:
        """Append an episode, replacing the oldest if full; returns its slot."""
        longest = self._config.episode_steps or self._longest
        return self._own.add(episode, self._starts(episode, longest))

    def give(self, episode: Episode) -> int:
        """Append a recorded episode, which stays; returns its slot."""
        longest = max(self._config.episode_steps, self._longest)
        return self._config.ring_slots + self._recorded.add(episode, self._starts(episode, longest))

    def __len__(self) -> int:
        return len(self._own.episodes) + len(self._recorded.episodes)

    @property
    def ready(self) -> bool:
        """Whether there is any segment to draw."""
        return self._own.ready or self._recorded.ready

    def _starts(self, episode: Episode, longest: int) -> int:
        """Number of frames at which a segment of an episode can start.

        ``longest`` is how many steps an episode can have, 0 if that is not known.

        Segments lie within their episode. If the TD target stops at terminal states, segments of a
        terminated episode may reach beyond its end, so that its last steps are drawn as often as
        the others, however short it is.
        """
        config = self._config
        if config.diffuses_plans:
            return window_count(
                len(episode),
                config.segment_steps,
                longest or sys.maxsize,
                padding=config.learn.plan.padding,
            )
        if episode.terminated and not config.learn.bootstrap_terminal:
            steps = len(episode)
        else:
            steps = max(0, len(episode) - config.segment_steps + 1)
        return -(-steps // config.frame_stride)

    def draw(self, rng: np.random.Generator, batch_size: int) -> Segments:
        """Draw B segments, uniformly over episodes or over start frames (``replay.sampling``).

        Of these, ``replay.data_share`` are of recorded episodes if there are both kinds. The same
        state of ``rng`` gives the same segments.

        Raises:
            ValueError: if no episode is long enough to hold a segment.
        """
        if not self.ready:
            steps = self._config.segment_steps
            raise ValueError(f"no episode of at least {steps} steps to sample from")
        count = 0 if self._own.ready else batch_size
        if self._own.ready and self._recorded.ready:
            whole, part = divmod(self._config.replay.data_share * batch_size, 1)
            count = int(whole) + (part > 0 and bool(rng.random() < part))
        parts = []
        if count < batch_size:
            parts.append(self._draw(self._own, rng, batch_size - count))
        if count:
            drawn = self._draw(self._recorded, rng, count)
            parts.append(drawn.replace(slots=drawn.slots + np.int32(self._config.ring_slots)))
        return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: np.concatenate(x), *parts)

    def _draw(self, ring: _Ring, rng: np.random.Generator, batch_size: int) -> Segments:
        model, span = self._config.model, self._config.segment_steps
        stride, count = self._config.frame_stride, len(ring.episodes)
        oldest_first = (ring.oldest + np.arange(count)) % max(count, 1)
        places = ring.places[oldest_first]
        if self._config.replay.sampling == "episode":
            eligible = np.flatnonzero(places)
            chosen = eligible[rng.integers(len(eligible), size=batch_size)]
            starts = stride * rng.integers(places[chosen])
        else:
            ends_of = np.cumsum(places)
            drawn_places = rng.integers(ends_of[-1], size=batch_size)
            chosen = np.searchsorted(ends_of, drawn_places, side="right")
            starts = stride * (drawn_places - (ends_of - places)[chosen])
        slots = oldest_first[chosen]
        drawn = [ring.episodes[slot] for slot in slots]
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
        first = self._config.ring_slots
        own, recorded = self._own.episodes, self._recorded.episodes
        drawn = [
            own[slot] if slot < first or not recorded else recorded[slot - first]
            for slot in segments.slots
        ]

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


class _Ring:
    """Episodes, the oldest replaced first if there is a capacity."""

    def __init__(self, capacity: int | None = None):
        self._capacity = capacity
        self.episodes: list[Episode] = []
        self.places = np.zeros(0, np.int64)  # starts of segments, by slot
        self.oldest = 0  # slot of the oldest episode

    @property
    def ready(self) -> bool:
        return bool(self.places.any())

    def add(self, episode: Episode, places: int) -> int:
        if self._capacity is None or len(self.episodes) < self._capacity:
            self.episodes.append(episode)
            self.places = np.append(self.places, places)
            return len(self.episodes) - 1
        slot = self.oldest
        self.episodes[slot], self.places[slot] = episode, places
        self.oldest = (slot + 1) % len(self.episodes)
        return slot


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
        within=segments.within,
    )
