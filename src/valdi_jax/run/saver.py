"""Saves a run's episodes and periodic checkpoints."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from valdi_jax.config import Config
from valdi_jax.data.episode import Episode
from valdi_jax.data.rollout import Rollout
from valdi_jax.data.source import Progress
from valdi_jax.run import checkpoint, npz, rundir
from valdi_jax.run.learner import Learner
from valdi_jax.run.rounds import Rounds


class Saver:
    """Keeps a run resumable. On a full disk the run continues and the last checkpoint stays.

    The run resumes from ``recovered``; ``say`` is called with a message if a write fails.

    Attributes:
        attempted: episodes at the last attempt to write a checkpoint.
    """

    def __init__(
        self,
        lock: rundir.Lock,
        run_dir: Path,
        config: Config,
        learner: Learner,
        progress: Progress,
        rounds: Rounds,
        recovered: checkpoint.Recovered,
        *,
        say: Callable[[str], None],
    ):
        self._lock, self.run_dir = lock, run_dir
        self._config, self._learner, self._progress, self._say = config, learner, progress, say
        self._rounds = rounds
        self._digests = dict(recovered.digests)  # checksums of the replay buffer's files
        self._unsaved: dict[int, Episode] = {}
        found = recovered.checkpoint is not None
        self._saved = dataclasses.replace(progress) if found else None
        self.attempted = progress.episodes if found else 0

    @property
    def complete(self) -> bool:
        """Whether the last checkpoint holds the whole progress of the run."""
        return self._saved == self._progress

    def add(self, numbers: Sequence[int], rollouts: Sequence[Rollout]) -> float:
        """Write a round's episodes, now or once there is room; returns the seconds taken.

        Raises:
            StoppedError: if the run's directory is gone.
        """
        self._lock.check()
        start = time.perf_counter()
        self._unsaved |= {n: r.episode for n, r in zip(numbers, rollouts, strict=True)}
        try:
            self._save_episodes()
        except OSError as error:
            self._say(f"warning: cannot save an episode, will try again: {error.strerror}")
        return time.perf_counter() - start

    def save(self) -> None:
        """Write a checkpoint and delete the episodes that left the replay buffer.

        Raises:
            StoppedError: if the agent was lost in a failed update or is not finite, or the
                directory is gone.
        """
        self._lock.check()
        self._learner.check()
        first = self._progress.episodes - self._config.replay.capacity
        self.attempted = self._progress.episodes
        try:
            self._save_episodes()
            self._digests = {n: digest for n, digest in self._digests.items() if n >= first}
            checkpoint.save(
                self.run_dir,
                self._learner.local,
                self._progress,
                keep=self._config.checkpoint.keep,
                replay=self._digests,
                under_way=self._rounds.under_way,
            )
        except OSError as error:
            self._say(f"warning: cannot save a checkpoint: {error}; the last one stays")
            return
        self._saved = dataclasses.replace(self._progress)
        oldest = int(rundir.checkpoints(self.run_dir)[0].name) - self._config.replay.capacity
        npz.prune_episodes(self.run_dir, before=oldest)

    def _save_episodes(self) -> None:
        """Raises OSError on failure; episodes not yet written stay pending."""
        while self._unsaved:
            number = min(self._unsaved)
            episode = self._unsaved[number]
            self._digests[number] = npz.save_episode(self.run_dir, number, episode)
            del self._unsaved[number]
