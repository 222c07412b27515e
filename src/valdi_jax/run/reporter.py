"""Reports of a run, to its log and its display."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from valdi_jax import cli, compilation
from valdi_jax.config import Config, leaves, to_dict
from valdi_jax.data.rollout import Rollout
from valdi_jax.data.source import Progress
from valdi_jax.errors import StoppedError
from valdi_jax.run.display import Display
from valdi_jax.run.log import RunLog, read_jsonl
from valdi_jax.types import Params


class Reporter:
    """Reports to the log and the display, and keeps the seconds in ``progress``.

    ``film(params, path)`` records an episode to a file; ``on_record`` is called with each record
    that was logged.

    Attributes:
        evaluated: episodes at the last evaluation.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        progress: Progress,
        console: Console,
        film: Callable[[Params, Path], None],
        on_record: Callable[[dict[str, Any]], object] | None = None,
    ):
        self._on_record = on_record or (lambda record: None)
        self._run_dir, self._config, self._progress = run_dir, config, progress
        self._film = film
        records = read_jsonl(run_dir / "metrics.jsonl")[: progress.episodes]
        returns = [record.get("episode/return") or 0.0 for record in records[-20:]]
        self._display = Display(
            console, config.collect.episodes, progress.episodes, returns, config.unit
        )
        self.say, self.phase = self._display.say, self._display.phase
        self._log = RunLog(
            run_dir,
            episodes=progress.episodes,
            env_steps=progress.env_steps,
            options={
                name: value if isinstance(value, (bool, int, float, str)) else str(value)
                for name, value in leaves(to_dict(config))
            },
            say=self.say,
        )
        evaluations = read_jsonl(run_dir / "evaluations.jsonl")
        self.evaluated = evaluations[-1]["episode"] + 1 if evaluations else 0
        self._begun = time.monotonic() - progress.seconds  # as if the run had never stopped
        self._planned = False
        self._compiled = False  # whether the compile time was reported
        self._unscored = 0  # consecutive episodes without a finite planner score

    def live(self) -> Display:
        """The display, as a context."""
        return self._display

    def collecting(self, numbers: Sequence[int]) -> None:
        """The episodes of a round are under way."""
        first, seed = numbers[0] + 1, self._config.collect.seed_episodes
        untrained = f", the untrained planner's {first} of {seed}" if first <= seed else ""
        compiling = "" if self._planned else " (the planner compiles first)"
        self._planned = True
        self.phase(f"collecting episode {first}{untrained}{compiling}")

    @contextlib.contextmanager
    def learning(self, owed: int, metrics: dict[str, float]) -> Iterator[list[dict[str, float]]]:
        """Context of ``owed`` updates; yields a list that takes the metrics of each.

        Their means go to ``metrics``.
        """
        each: list[dict[str, float]] = []
        if owed > 0:
            compiling = "" if self._compiled else " (the first compiles)"
            self.phase(f"learning: {owed} updates{compiling}")
        start = time.perf_counter()
        try:
            yield each
        finally:
            if each:
                metrics |= _means(each)
                metrics["time/learn_s"] = time.perf_counter() - start
                metrics["time/update_ms"] = 1e3 * metrics["time/learn_s"] / len(each)
                self.tick()

    def check_scores(self, rollouts: Sequence[Rollout]) -> None:
        """Raise StoppedError after too many consecutive episodes without a finite score."""
        first = self._progress.episodes - len(rollouts) + 1
        for number, rollout in enumerate(rollouts, first):
            finite = np.isfinite(rollout.predicted_return)
            self._unscored = 0 if finite else self._unscored + 1
            if self._unscored >= self._config.learn.nonfinite_limit:
                raise StoppedError(
                    f"the planner's scores were not finite in {self._unscored} episodes in a row, "
                    f"the last of them episode {number}"
                )

    def episodes(
        self,
        numbers: Sequence[int],
        rollouts: Sequence[Rollout],
        metrics: dict[str, float],
        updates: int,
    ) -> None:
        """Report a round's episodes, with the metrics of its updates."""
        for number, rollout in zip(numbers, rollouts, strict=True):
            record = {
                "episode": number,
                "episode/return": rollout.episode.episode_return,
                "episode/length": len(rollout.episode),
                "episode/terminated": rollout.episode.terminated,
                "episode/seed": rollout.episode.seed,
                "plan/predicted_return": rollout.predicted_return,
                **rollout.metrics,
                "time/plan_ms": 1e3 * float(np.median(rollout.plan_seconds)),
                "time/plan_s": float(np.sum(rollout.plan_seconds)),
                "time/env_ms": 1e3 * float(np.median(rollout.env_seconds)),
                "time/env_s": float(np.sum(rollout.env_seconds)),
                "time/seconds": self._progress.seconds,
                **_memory(),
                "total/env_steps": self._progress.env_steps,
                "total/updates": updates,
                **metrics,
            }
            self._record(record)
        if updates:
            self._say_compiled()

    def epoch(self, number: int, metrics: dict[str, float], updates: int) -> None:
        """Report an epoch on recorded data, with the metrics of its updates."""
        self._record(
            {
                "episode": number,
                "time/seconds": self._progress.seconds,
                **_memory(),
                "total/env_steps": 0,
                "total/updates": updates,
                **metrics,
            }
        )
        self._say_compiled()

    def _record(self, record: dict[str, Any]) -> None:
        self._log.episode(record)
        self._display.episode(record)
        self._on_record(record)

    def _say_compiled(self) -> None:
        if not self._compiled:
            self._compiled = True
            seconds, spared = compilation.compile_cost()
            cached = jax.config.values["jax_compilation_cache_dir"] is not None
            self.say(
                f"compiled for {seconds:.0f} s in all; "
                + (
                    f"{spared} programs came from the cache"
                    if cached
                    else "no cache: the next start compiles again"
                )
            )

    def evaluation(self, rollouts: Sequence[Rollout], params: Params) -> None:
        """Report an evaluation of ``params``, with a video if the configuration asks for one."""
        self.evaluated = self._progress.episodes
        returns = [rollout.episode.episode_return for rollout in rollouts]
        record = {
            "episode": self._progress.episodes - 1,
            "eval/return": float(np.mean(returns)),
            "eval/length": float(np.mean([len(rollout.episode) for rollout in rollouts])),
            "total/env_steps": self._progress.env_steps,
            "returns": returns,
        }
        self._log.evaluation(record)
        self._on_record(record)
        self.say(
            f"evaluation after {self._progress.episodes} {self._config.unit}s: mean return "
            f"{np.mean(returns):.1f} over {len(returns)}"
        )
        if self._config.eval.video:
            self._record_video(params, record)

    def _record_video(self, params: Params, record: dict[str, Any]) -> None:
        path = self._run_dir / "videos" / f"{self._progress.episodes:08d}.gif"
        try:
            path.parent.mkdir(exist_ok=True)
            self._film(params, path)
        except cli.Interrupted:
            raise
        except Exception as reason:  # an environment may raise anything, or draw nothing
            self.say(f"warning: no video: {reason}")
        else:
            self._log.video(record, path)

    def close(self) -> None:
        self._log.close()

    def tick(self) -> None:
        """Update the elapsed seconds."""
        self._progress.seconds = time.monotonic() - self._begun


def _memory() -> dict[str, float]:
    """Memory of this process, and peak memory of the device, in GB."""
    used = {}
    statm = Path("/proc/self/statm")
    if statm.exists():
        pages = int(statm.read_text().split()[1])
        used["memory/host_gb"] = pages * os.sysconf("SC_PAGE_SIZE") / 1e9
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        used["memory/device_gb"] = stats["peak_bytes_in_use"] / 1e9
    return used


def _means(metrics: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over its finite values."""
    means = {}
    for name in metrics[0]:
        values = np.array([m[name] for m in metrics])
        if np.isfinite(values).any():
            means[name] = float(values[np.isfinite(values)].mean())
    return means
