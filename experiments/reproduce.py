"""The paper's figures and table as one page, stage by stage, from agents or from nothing.

python experiments/reproduce.py --out build/figures              # the agents in the box
python experiments/reproduce.py --out runs/reproduce --train     # trains both of its own before

Interrupt it, and the same command goes on: OUT/times.json says which stages are done, with which
command and in what time; a stage under way keeps what its script keeps, training and the sweep of
steps what they have computed. OUT/logs holds what each stage printed, OUT/report.html the page.
Stages that do not need each other run side by side, each on a core of its own.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from decoder import shipped

from valdi_jax import cli
from valdi_jax.dynamics import DYNAMICS
from valdi_jax.errors import UsageError
from valdi_jax.run.manifest import write_json
from valdi_jax.run.stored import open_agent

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BOX = ("carracing", "carracing-mlp")
# The runs that agents of ours are from; some went on after these were taken.
CURVES = {
    "carracing": Path("experiments/curves/cpu-diffusion-averaged-0"),
    "carracing-mlp": Path("experiments/curves/cpu-mlp-averaged-1"),
    "experiments/seeds/carracing-1": Path("experiments/curves/cpu-diffusion-averaged-1"),
    "experiments/seeds/carracing-mlp-0": Path("experiments/curves/cpu-mlp-averaged-0"),
}
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
TIMES, REPORT = "times.json", "report.html"


class Named(NamedTuple):
    """An agent to draw."""

    agent: str  # as a script takes it
    stored: str  # the checkpoint that this is now
    generative: bool  # imagines futures that differ with the noise
    curve: Path | None  # the run that it is from
    decoder: Path | None = None  # that it comes with

    @property
    def label(self) -> str:
        return Path(self.agent).name


class Sizes(NamedTuple):
    """Options of the scripts: an hour of one core, and 18 minutes a decoder."""

    scores: str = "--episodes 20"
    steps: Sequence[str] = ("2 4 4x2 8", "1 8x2")  # stages that take about the same time
    values: str = "--episodes 25 --states 5000"
    decoder: str = "--episodes 12 --validation 2 --epochs 12 --batch-size 8 --learning-rate 1e-3"
    futures: str = "--steps 1 2 4 8"
    plans: str = "--decisions 100"


QUICK = Sizes("--quick", ("1 2",), *["--quick"] * 4)


class Stage(NamedTuple):
    """A command with the files that it leaves."""

    name: str
    command: str  # what a shell takes
    outputs: tuple[Path, ...]
    needs: tuple[str, ...] = ()
    keeps: tuple[Path, ...] = ()  # of these, what the next attempt goes on from


def describe(agent: str) -> Named:
    """An agent by what it is stored with.

    Raises:
        UsageError: if it is none of CarRacing with a world model and values, as the paper's.
    """
    opened = open_agent(agent)
    config = opened.config
    if config.env.name != "carracing":
        raise UsageError(f"{agent} is of {config.env.name}: the paper's figures are of carracing")
    if config.diffuses_plans or "q" in config.model.networks:
        raise UsageError(f"{agent} has no values of states, which the paper's table is of")
    own = Path(agent) if (Path(agent) / "metrics.jsonl").exists() else None
    generative = DYNAMICS[opened.config.model.dynamics].step is None
    decoder = shipped(agent)
    decoder = decoder and Path(from_root(str(decoder)))
    return Named(agent, opened.name, generative, CURVES.get(agent, own), decoder)


def stages(
    out: Path, agents: Sequence[Named], sizes: Sizes, trained: Sequence[str] = ()
) -> list[Stage]:
    """What makes the figures of agents; ``trained`` names stages that make the agents first."""
    found: list[Stage] = []

    def add(
        name: str,
        script: str,
        subjects: Sequence[str],
        options: str,
        files: dict[str, str],
        needs: Sequence[str] = (),
        keeps: Sequence[str] = (),
    ) -> None:
        paths = {option: out / file for option, file in files.items()}
        given = [shlex.join([option, str(path)]) for option, path in paths.items()]
        words = ["python", f"experiments/{script}", shlex.join(subjects), options, *given]
        kept = tuple(paths[option] for option in keeps)
        command = " ".join(word for word in words if word)
        found.append(Stage(name, command, tuple(paths.values()), (*trained, *needs), kept))

    names = [each.agent for each in agents]
    generative = next((each for each in agents if each.generative), None)
    if generative and not generative.decoder:
        add("decoder", "decoder.py", [generative.agent], sizes.decoder, {"--out": "decoder"})
    scored = []
    for each in agents:
        for part, steps in enumerate(sizes.steps if each.generative else sizes.steps[:1], 1):
            scored.append(f"scores-{each.label}-{part}")
            options, files = f"{sizes.scores} --steps {steps}", {"--json": f"{scored[-1]}.json"}
            add(scored[-1], "steps_sweep.py", [each.agent], options, files, keeps=["--json"])
    known = shlex.join(["--known", *[str(out / f"{name}.json") for name in scored]])
    options = f"{sizes.scores} --steps {' '.join(sizes.steps)} {known}"
    files = {"--json": "steps.json", "--figure": "steps.png"}
    add("steps", "steps_sweep.py", names, options, files, scored)
    if generative:
        both = [generative.agent, str(generative.decoder or out / "decoder")]
        needs = [] if generative.decoder else ["decoder"]
        files = {"--json": "futures.json", "--out": "futures.png"}
        add("futures", "diverse_futures.py", both, sizes.futures, files, needs)
    for each in agents:
        name = f"values-{each.label}"
        files = {"--json": f"{name}.json"}
        add(name, "value_diagnostics.py", [each.agent], sizes.values, files)
    for each in agents:
        name = f"plans-{each.label}"
        options, needs = sizes.plans, []
        if each is generative and not each.decoder:  # a shipped one is found by its name
            options += f" --decoder {shlex.quote(str(out / 'decoder'))}"
            needs = ["decoder"]
        add(name, "plan_video.py", [each.agent], options, {"--out": f"{name}.mp4"}, needs)
    curves = [f"{each.label}={each.curve}" for each in agents if each.curve]
    if curves:
        files = {"--json": "curves.json", "--out": "curves.png"}
        add("curves", "training_curves.py", curves, "", files)
    everything = (*trained, *[stage.name for stage in found])
    command = shlex.join(["python", "experiments/report.py", str(out)])
    found.append(Stage("report", command, (out / REPORT,), everything))
    return found


def training(out: Path, options: str) -> tuple[list[Named], list[Stage]]:
    """Both of the paper's agents, to be trained under a folder, and what trains them."""
    agents, found = [], []
    for dynamics in ("diffusion", "mlp"):
        run = out / dynamics
        command = f"python -m valdi_jax.train --env carracing {options}"
        command += f" --model.dynamics {dynamics} --run-dir {shlex.quote(str(run))}"
        agents.append(Named(str(run), str(run), dynamics == "diffusion", run))
        name = f"train-{dynamics}"
        found.append(Stage(name, command, (run,), keeps=(run,)))
    return agents, found


def attempt(stage: Stage) -> list[str]:
    """The command to start; a run that exists is resumed."""
    words = shlex.split(stage.command)
    if "--run-dir" in words:
        run = words[words.index("--run-dir") + 1]
        if (Path(run) / "config.json").exists():
            words = ["python", "-m", "valdi_jax.train", "--resume", run]
    return [sys.executable, *words[1:]]


class Runner:
    """Runs stages, and keeps the record of those that are done."""

    def __init__(self, out: Path, stages: Sequence[Stage], cores: int, agents: Sequence[str] = ()):
        self.out, self.stages, self.cores, self.agents = out, list(stages), cores, list(agents)
        self.record: dict[str, dict[str, Any]] = {}
        if (out / TIMES).exists():
            before = json.loads((out / TIMES).read_text())
            self.record = before["stages"]
            if before["agents"] != self.agents:
                raise UsageError(
                    f"{out} holds results of {' and '.join(before['agents'])}, not of "
                    f"{' and '.join(self.agents)}: give another --out, or remove it"
                )
        for stage in stages:
            known = self.record.get(stage.name)
            if known and known["command"] != stage.command:
                raise UsageError(
                    f"{out} holds results of another command ({known['command']}): give another "
                    "--out, or remove it"
                )
        # Each on a core of its own, so that times are those of one core.
        allowed = sorted(os.sched_getaffinity(0)) if shutil.which("taskset") else []
        self.pins = allowed[:cores] if 1 < cores <= len(allowed) else []

    def left(self) -> list[Stage]:
        """Stages to run; what these will replace is removed."""
        left: list[Stage] = []
        for stage in self.stages:
            stale = any(other.name in stage.needs for other in left)
            known = self.record.get(stage.name, {})
            made = known.get("done") and all(map(Path.exists, stage.outputs))
            if made and not stale and stage.name != "report":  # which takes seconds
                say(f"{stage.name}: done before, {length(known['seconds'])}")
                continue
            left.append(stage)
            for path in stage.outputs:
                if stale or path not in stage.keeps:
                    remove(path)
            if stale or known.get("done"):
                self.record.pop(stage.name, None)
        return left

    def note(self, stage: Stage, since: float, done: bool) -> None:
        """Record an attempt; the time of a stage is that of all its attempts."""
        before = self.record.get(stage.name, {}).get("seconds", 0.0)
        seconds = round(before + time.monotonic() - since, 1)
        self.record[stage.name] = {"command": stage.command, "seconds": seconds, "done": done}
        about = {"agents": self.agents, "cores": self.cores}
        write_json(self.out / TIMES, about | {"stages": self.record})

    def run(self, lock: int) -> bool:
        """Run what is left; whether all succeeded. An interrupt is passed on, and raised."""
        waiting = self.left()
        # Noted, and raised between stages' starts: within one, it would lose sight of the stage.
        noted: list[int] = []
        before = {each: signal.getsignal(each) for each in SIGNALS}
        for each in SIGNALS:
            signal.signal(each, lambda number, _: noted.append(number))
        running: dict[int, tuple[Stage, subprocess.Popen, float]] = {}  # by slot
        failed = False
        try:
            while waiting or running:
                if noted:
                    raise KeyboardInterrupt
                unfinished = {s.name for s in waiting} | {s.name for s, *_ in running.values()}
                ready = [s for s in waiting if not unfinished.intersection(s.needs)]
                free = [slot for slot in range(self.cores) if slot not in running]
                for slot, stage in zip(free, [] if failed else ready, strict=False):
                    waiting.remove(stage)
                    running[slot] = stage, self.start(stage, slot, lock), time.monotonic()
                if not running:
                    break
                time.sleep(0.05)
                for slot, (stage, process, since) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[slot]
                    done = process.returncode == 0 and all(map(Path.exists, stage.outputs))
                    self.note(stage, since, done)
                    took = length(self.record[stage.name]["seconds"])
                    say(f"{stage.name}: {took if done else f'failed; see {self.log(stage)}'}")
                    failed |= not done
        except KeyboardInterrupt:
            for each, handler in before.items():
                signal.signal(each, handler)  # a second one ends the stages at once
            say("stopping; the same command goes on from here")
            self.stop(running)
            raise
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
        return not failed

    def stop(self, running: dict[int, tuple[Stage, subprocess.Popen, float]]) -> None:
        """Let stages save; a second interrupt ends them at once."""
        for _, process, _ in running.values():
            process.send_signal(signal.SIGINT)
        for stage, process, since in running.values():
            while process.poll() is None:
                try:
                    process.wait()
                except KeyboardInterrupt:
                    process.kill()
            self.note(stage, since, False)

    def log(self, stage: Stage) -> Path:
        return self.out / "logs" / f"{stage.name}.log"

    def start(self, stage: Stage, slot: int, lock: int) -> subprocess.Popen:
        command = attempt(stage)
        if self.pins:
            command = ["taskset", "-c", str(self.pins[slot]), *command]
        self.log(stage).parent.mkdir(exist_ok=True)
        say(f"{stage.name}: {stage.command}")
        with self.log(stage).open("ab") as log:
            # In a session of its own, a stage is interrupted once, from here, and can save. It
            # holds the lock, too: where this process was killed, no other starts beside it.
            return subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=(lock,),
            )


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def length(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def from_root(path: str) -> str:
    """A path as the scripts take it: they run in the repository's root."""
    whole = Path(path).resolve()
    return str(whole.relative_to(ROOT) if whole.is_relative_to(ROOT) else whole)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="of results and page")
    parser.add_argument(
        "--agents",
        nargs="+",
        default=BOX,
        metavar="AGENT",
        help="of CarRacing; by default the box's",
    )
    parser.add_argument("--train", action="store_true", help="both agents first, in OUT")
    parser.add_argument("--preset", default="cpu", help="of training; a trial takes tiny")
    parser.add_argument("--seed", type=int, default=0, help="of training")
    parser.add_argument("--cores", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--quick", action="store_true", help="a trial of all stages, in minutes")
    arguments = parser.parse_args(argv)
    if arguments.cores < 1:
        raise UsageError(f"--cores is {arguments.cores}; it must be above 0")
    return arguments


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    out, sizes = Path(from_root(arguments.out)), QUICK if arguments.quick else Sizes()
    os.chdir(ROOT)  # so that commands in the page can be copied
    if arguments.train:
        preset = "tiny" if arguments.quick else arguments.preset
        agents, first = training(out, f"--preset {preset} --seed {arguments.seed}")
    else:
        given = [from_root(name) if Path(name).exists() else name for name in arguments.agents]
        agents, first = [describe(name) for name in given], []
    labels = [agent.label for agent in agents]
    if len(set(labels)) < len(labels):
        raise UsageError(f"agents need names that differ, not {' and '.join(labels)}")
    out.mkdir(parents=True, exist_ok=True)
    todo = [*first, *stages(out, agents, sizes, [stage.name for stage in first])]
    runner = Runner(out, todo, arguments.cores, [agent.stored for agent in agents])
    with (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process makes the figures in {out}") from None
        # Also of SIGINT: a shell starts what runs in its background with it ignored.
        for each in SIGNALS:
            signal.signal(each, signal.default_int_handler)
        if not runner.run(lock.fileno()):
            return 1
    say(f"{out / REPORT}")
    return 0


if __name__ == "__main__":
    cli.run(main)
