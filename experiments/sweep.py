"""Train a grid of tasks, agents and seeds on one machine, and gather the results.

python experiments/sweep.py runs/grid --tasks pendulum lunarlander --agents diffusion mlp \\
    "wide=--model.value-width 512" --seeds 0 1 2 --cores 0 1 [-- OPTIONS OF ALL RUNS]

Each core trains one run at a time. Ctrl-C saves all of them; the same command goes on, each run
with the options it began with. At the end, or at once with --gather, it prints a table of scores.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from scipy.stats import trim_mean

from valdi_jax import cli
from valdi_jax.errors import StoppedError, UsageError
from valdi_jax.run.log import read_jsonl
from valdi_jax.train import parse_arguments


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    task: str
    agent: str
    seed: int
    directory: Path
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.directory.name

    def command(self) -> list[str]:
        start = [sys.executable, "-m", "valdi_jax.train"]
        if self.started():
            return [*start, "--resume", str(self.directory)]
        chosen = ["--env", self.task, "--seed", str(self.seed), *self.options]
        return [*start, "--run-dir", str(self.directory), *chosen]

    def check(self) -> None:
        """Raise UsageError if the options of a run that has not started are invalid."""
        try:
            parse_arguments(self.command()[3:])
        except UsageError as error:
            raise UsageError(f"{self.name}: {error}") from error

    def episodes(self) -> tuple[int, int]:
        """Episodes of the run so far, and in all (0 before it starts)."""
        records = _read(self.directory / "metrics.jsonl")
        done = records[-1]["episode"] + 1 if records else 0  # they count from 0
        return done, self._config()["collect"]["episodes"] if self.started() else 0

    def finished(self) -> bool:
        """Whether all episodes are driven, and evaluated as often as the run evaluates."""
        done, episodes = self.episodes()
        if not self.started() or done < episodes:
            return False
        every = self._config()["eval"]["every"]
        due = episodes // every * every if every else 0
        scores = _read(self.directory / "evaluations.jsonl")
        return not due or (bool(scores) and scores[-1]["episode"] + 1 >= due)

    def started(self) -> bool:
        return (self.directory / "config.json").exists()

    def _config(self) -> dict:
        return json.loads((self.directory / "config.json").read_text())

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Decisions and mean return of each evaluation."""
        scores = _read(self.directory / "evaluations.jsonl")
        pairs = [(record["total/env_steps"], record["eval/return"]) for record in scores]
        return tuple(np.array(pairs, dtype=float).reshape(-1, 2).T)


def _read(path: Path) -> list[dict]:
    return list(read_jsonl(path)) if path.exists() else []


def agent_options(agent: str) -> tuple[str, tuple[str, ...]]:
    """The name and options of ``NAME=OPTIONS``, or of the world model ``NAME``."""
    name, given, options = agent.partition("=")
    return name, tuple(shlex.split(options)) if given else ("--model.dynamics", name)


def make_grid(
    root: Path,
    tasks: Iterable[str],
    agents: Iterable[str],
    seeds: Iterable[int],
    options: Iterable[str] = (),
) -> list[Cell]:
    """All runs, the first seed of every task and agent before the second of any."""
    named = [agent_options(agent) for agent in agents]
    return [
        Cell(
            task=task,
            agent=name,
            seed=seed,
            directory=root / f"{task.replace(':', '-').replace('/', '-')}-{name}-{seed}",
            options=(*options, *own),
        )
        for seed in seeds
        for task in tasks
        for name, own in named
    ]


def train(cells: list[Cell], cores: list[int], nice: int = 0) -> list[str]:
    """Run what is not finished, one run a core at a time; the names of those that failed."""
    waiting = [cell for cell in cells if not cell.finished()]
    running: dict[int, tuple[Cell, subprocess.Popen]] = {}
    failed: list[str] = []
    bars: dict[str, int] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Progress(*columns, TimeElapsedColumn()) as progress:
        overall = progress.add_task("runs", total=len(cells), completed=len(cells) - len(waiting))
        try:
            while waiting or running:
                for core in cores:
                    if core not in running and waiting:
                        cell = waiting.pop(0)
                        running[core] = cell, _start(cell, core, nice)
                        bars[cell.name] = progress.add_task(cell.name, total=None)
                time.sleep(1)
                for core, (cell, process) in list(running.items()):
                    done, episodes = cell.episodes()
                    progress.update(bars[cell.name], completed=done, total=episodes or None)
                    if process.poll() is None:
                        continue
                    del running[core]
                    progress.remove_task(bars.pop(cell.name))
                    progress.advance(overall)
                    if process.returncode:
                        failed.append(cell.name)
                        log = _log(cell)
                        progress.console.print(
                            f"{cell.name} failed with status {process.returncode}: {log}"
                        )
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.wait()
    return failed


def _log(cell: Cell) -> Path:
    return cell.directory.parent / "logs" / f"{cell.name}.log"


def _start(cell: Cell, core: int, nice: int) -> subprocess.Popen:
    _log(cell).parent.mkdir(parents=True, exist_ok=True)

    def settle() -> None:
        os.sched_setaffinity(0, {core})
        os.nice(nice)

    with _log(cell).open("a") as log:
        return subprocess.Popen(
            cell.command(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C reaches this program alone, which passes it on
            preexec_fn=settle,
        )


def interval(
    groups: list[np.ndarray], statistic, *, samples: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
    """A statistic of all values and its stratified bootstrap interval (Agarwal et al., 2021).

    Args:
        groups: the values of each task, one a seed; seeds are drawn anew within each task.
        statistic: from a vector to a number.
    """
    random = np.random.default_rng(0)
    drawn = [
        statistic(np.concatenate([random.choice(group, len(group)) for group in groups]))
        for _ in range(samples)
    ]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(statistic(np.concatenate(groups))), float(low), float(high)


def interquartile_mean(values: np.ndarray) -> float:
    return float(trim_mean(values, 0.25))


def aggregate(groups: list[np.ndarray]) -> str:
    """Interquartile mean of tasks' scores, with its interval if each has several seeds."""
    if min(map(len, groups)) < 2:
        return f"{interquartile_mean(np.concatenate(groups)):.0f}"
    return "{:.0f} [{:.0f}, {:.0f}]".format(*interval(groups, interquartile_mean))


def common_tasks(cells: list[Cell], step: float = np.inf) -> list[str]:
    """Tasks on which each agent has a score, so that their aggregates compare."""
    scored = {(c.task, c.agent) for c in cells if last_return(c, step) is not None}
    agents = {cell.agent for cell in cells}
    tasks = dict.fromkeys(cell.task for cell in cells)
    return [task for task in tasks if all((task, agent) in scored for agent in agents)]


def table(cells: list[Cell], step: float = np.inf) -> str:
    """Markdown: each task's last evaluation up to so many decisions, over seeds that got there."""
    agents = list(dict.fromkeys(cell.agent for cell in cells))
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    ends = {(c.task, c.agent, c.seed): last_return(c, step) for c in cells}
    lines = ["| task | " + " | ".join([*agents, "decisions"]) + " |"]
    lines.append("|---" * (len(agents) + 2) + "|")

    def scores(task: str, agent: str) -> np.ndarray:
        chosen = [v for (t, a, _), v in ends.items() if (t, a) == (task, agent) and v is not None]
        return np.array(chosen)

    def _range(task: str) -> str:
        scored = [c for c in cells if c.task == task and ends[c.task, c.agent, c.seed] is not None]
        at = sorted({last_evaluation(cell, step)[0] for cell in scored})
        return " to ".join(f"{x:,.0f}" for x in dict.fromkeys([*at[:1], *at[-1:]]))

    for task in tasks:
        row = [_mean(scores(task, agent)) for agent in agents]
        lines.append(f"| {task} | " + " | ".join([*row, _range(task)]) + " |")
    common = common_tasks(cells, step)
    if len(common) > 1:
        row = [aggregate([scores(task, agent) for task in common]) for agent in agents]
        title = f"interquartile mean of {len(common)} tasks, 95% interval"
        lines.append(f"| {title} | " + " | ".join([*row, ""]) + " |")
    return "\n".join(lines)


def last_return(cell: Cell, step: float = np.inf) -> float | None:
    """Mean return of a run's last evaluation up to a number of decisions, if it got so far."""
    at, value = last_evaluation(cell, step)
    return None if value is None or (step < np.inf and at < 0.95 * step) else value


def last_evaluation(cell: Cell, step: float = np.inf) -> tuple[float, float | None]:
    """Decisions and mean return of a run's last evaluation up to a number of decisions."""
    steps, returns = cell.curve()
    within = steps <= step
    return (float(steps[within][-1]), float(returns[within][-1])) if any(within) else (0.0, None)


def _mean(values: np.ndarray) -> str:
    if not len(values):
        return ""
    error = f" ± {values.std(ddof=1) / np.sqrt(len(values)):.0f}" if len(values) > 1 else ""
    return f"{values.mean():.0f}{error} ({len(values)})"


def parse_grid(
    parser: argparse.ArgumentParser, argv: Sequence[str], **defaults
) -> argparse.Namespace:
    """Add the options of a grid to a program's own and parse its command line."""
    parser.add_argument("root", type=Path, help="directory of the runs")
    parser.add_argument("--tasks", nargs="+", metavar="ENV", **_default(defaults, "tasks"))
    parser.add_argument(
        "--agents", nargs="+", default=["diffusion", "mlp"], metavar="NAME[=OPTIONS]"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cores", nargs="+", type=int, default=sorted(os.sched_getaffinity(0)))
    parser.add_argument("--nice", type=int, default=0, help="niceness of the runs")
    parser.add_argument("--gather", action="store_true", help="train nothing")
    parser.epilog = "What follows -- are options of valdi_jax.train, for all runs."
    end = argv.index("--") if "--" in argv else len(argv)
    arguments = parser.parse_args(argv[:end])
    arguments.options = argv[end + 1 :]
    missing = set(arguments.cores) - os.sched_getaffinity(0)
    if missing:
        parser.error(f"--cores: there is no core {min(missing)} to run on")
    return arguments


def _default(defaults: dict, name: str) -> dict:
    return {"default": defaults[name]} if name in defaults else {"required": True}


def run_grid(arguments: argparse.Namespace) -> list[Cell]:
    """Train a grid unless it is only to be gathered.

    Raises:
        UsageError: if a run's options are invalid; then none starts.
        StoppedError: if a run failed.
    """
    cells = make_grid(
        arguments.root, arguments.tasks, arguments.agents, arguments.seeds, arguments.options
    )
    if arguments.gather:
        return cells
    # Options do not depend on the seed.
    for cell in {(cell.task, cell.agent): cell for cell in cells if not cell.started()}.values():
        cell.check()
    failed = train(cells, arguments.cores, arguments.nice)
    if failed:
        raise StoppedError(
            f"{len(failed)} of {len(cells)} runs failed; --gather prints what the others scored"
        )
    return cells


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    print(table(run_grid(parse_grid(parser, argv))))


if __name__ == "__main__":
    cli.run(main)
