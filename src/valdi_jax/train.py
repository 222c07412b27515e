"""Train an agent: ``python -m valdi_jax.train --env carracing``."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from valdi_jax import checkpoint, cli
from valdi_jax.checkpoint import Progress
from valdi_jax.collect import Driven, Job, drive, exploration_noise, first_carries, plan_batch
from valdi_jax.config import Config, default_config, to_dict, validate
from valdi_jax.envs import interface_of, make_env
from valdi_jax.envs.workers import Pool, make_pool
from valdi_jax.errors import StoppedError, UsageError
from valdi_jax.evaluate import evaluate
from valdi_jax.learner import Learner, check
from valdi_jax.progress import Display, RunLog, read_jsonl
from valdi_jax.replay import Episode
from valdi_jax.types import AgentState, Array, Observation, Params
from valdi_jax.update import init_state, start_from

# What may differ between a run and its continuation: how long it goes on, what it reports, and
# where it computes.
_CHANGEABLE = (
    *("collect.episodes", "collect.worker_timeout", "eval.", "checkpoint."),
    *("replay.placement", "learn.updates_per_dispatch", "learn.devices"),
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line of the training command."""

    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Defaults to start from: paper (every value of the paper's Table 3), cpu (CarRacing in
    an hour of one core), tiny (a smoke run of about a minute), pendulum, mountaincar,
    lunarlander, bipedalwalker, bipedalwalker-hardcore, or gym (any other environment). By default
    what suits the environment: paper for carracing."""
    run_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory of the run; a new one under runs/ if not given."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Run directory to continue from its last checkpoint."""
    init_from: Annotated[Path | None, tyro.conf.arg(metavar="AGENT")] = None
    """Start a new run from the parameters of a run, a checkpoint, an exported agent, or one that
    comes with the package; without --preset, with its settings as well."""
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


def train(
    config: Config,
    run_dir: Path,
    *,
    resume: bool = False,
    init_from: Path | None = None,
    make: Callable[..., gym.Env] = make_env,
    console: Console | None = None,
) -> AgentState:
    """Collect and learn until ``config.collect.episodes`` episodes have been driven.

    Args:
        config: the run's configuration.
        run_dir: where it is kept (see `checkpoint`).
        resume: go on from the last checkpoint rather than start a run.
        init_from: agent whose parameters a new run starts from (see `checkpoint.open_agent`).
        make: called as ``make(config.env, training=True)`` for an environment to train in, and with
            ``training=False`` for one to be scored in; it must pickle if there are several.
        console: where progress is shown.

    Returns: the trained agent.

    Raises:
        UsageError: if the directory cannot serve, the configuration is not valid, it is not
            that of the run to go on with, or the parameters to start from do not fit it.
        cli.Interrupted: after Ctrl-C or SIGTERM, once a checkpoint is written.
        StoppedError: if losses or scores stay not finite, or an environment is lost for good,
            likewise.
    """
    # How large an action is follows from the environment, which the configuration comes before.
    validate(config.replace(model={"action_dim": 1}))
    console = console or Console()
    factory = functools.partial(make, config.env, training=True)
    interface = interface_of(factory)
    example = interface.example
    config = config.replace(model={"action_dim": interface.action_dim})
    validate(config)
    check(example, config)
    init_key, drive_key = jax.random.split(jax.random.key(config.seed))
    if resume and init_from is not None:
        raise UsageError("a run that is resumed has its parameters: init_from is for a new one")
    if resume:
        _refuse_changes(checkpoint.load_config(run_dir), config)
    elif init_from is not None:
        given = checkpoint.open_agent(init_from).load(example, config=config)
        first = start_from(init_state(init_key, example, config=config), given)
        checkpoint.create_run(run_dir, config, first)
    else:
        checkpoint.create_run(run_dir, config)

    with cli.interruptible() as interrupt, contextlib.ExitStack() as stack:
        stack.enter_context(checkpoint.lock(run_dir))
        kept = resume or init_from is not None
        found, digests, sentences = checkpoint.recover(run_dir) if kept else (None, {}, [])
        say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
        say(f"run directory: {run_dir}")
        for sentence in sentences:
            say(f"warning: {sentence}")
        if found:
            state, progress = checkpoint.load(found, example, config)
        else:  # also where a run ended before its first checkpoint
            state, progress = init_state(init_key, example, config=config), Progress()
        if config.collect.episodes < progress.episodes:
            raise UsageError(
                f"--collect.episodes is {config.collect.episodes}, but the run has driven "
                f"{progress.episodes} already"
            )
        if resume:
            checkpoint.save_config(run_dir, config)
        records = read_jsonl(run_dir / "metrics.jsonl")[: progress.episodes]
        returns = [record["episode/return"] for record in records[-20:]]
        display = Display(console, config.collect.episodes, progress.episodes, returns)
        log = RunLog(run_dir, episodes=progress.episodes, say=display.say)
        stack.callback(log.close)
        learner = Learner(state, example, config=config, run_dir=run_dir, say=display.say)
        for number in digests:
            learner.restore(checkpoint.load_episode(run_dir, number, example, config))
        if (devices := jax.device_count()) > 1:
            display.say(f"planning on {devices} devices, learning on {learner.devices}")
        pool = make_pool(
            factory,
            config.collect.num_envs,
            example=example,
            chunk=config.model.chunk,
            last_only=config.env.render_every == "chunk",
            timeout=config.collect.worker_timeout,
        )
        stack.callback(pool.close)
        executor = stack.enter_context(ThreadPoolExecutor(1, "drive"))
        evaluations = read_jsonl(run_dir / "evaluations.jsonl")
        run = _Run(
            config=config,
            run_dir=run_dir,
            learner=learner,
            progress=progress,
            digests=digests,
            pool=pool,
            executor=executor,
            log=log,
            display=display,
            make=make,
            interrupt=interrupt,
            drive_key=drive_key,
            evaluated=evaluations[-1]["episode"] + 1 if evaluations else 0,
            saved=progress if found else None,
            attempted=progress.episodes if found else 0,
            clock=time.monotonic() - progress.seconds,
        )
        if config.planner.candidates * config.planner.iterations >= 2000:
            run.say_cost(example)
        stack.enter_context(display)
        run.go()
    return learner.state


@dataclasses.dataclass
class _Run:
    """A training run between its steps."""

    config: Config
    run_dir: Path
    learner: Learner
    progress: Progress
    digests: dict[int, str]  # checksums of the replay's episodes on disk
    pool: Pool
    executor: ThreadPoolExecutor  # drives where learning overlaps with it
    log: RunLog
    display: Display
    make: Callable[..., gym.Env]
    interrupt: Callable[[], None]  # raises Interrupted once a signal has come
    drive_key: Array
    evaluated: int  # episodes at the last evaluation
    saved: Progress | None  # at the last checkpoint
    attempted: int  # episodes when a checkpoint was last written, or could not be
    clock: float  # when the run would have begun, had it never stopped
    unsaved: dict[int, Episode] = dataclasses.field(default_factory=dict)  # not yet on disk
    said_compiling: bool = False  # how long that took, once everything is compiled
    unscored: int = 0  # episodes in a row that the planner had no finite score for

    def go(self) -> None:
        """Run to the end, or to an interrupt; leave a checkpoint either way."""
        total = self.config.collect.episodes
        before = self.progress.episodes, self.learner.updates, self.evaluated
        overlap = self.config.collect.overlap
        try:
            while True:
                # What an interrupt left undone, or, driving and learning at once, the last round.
                if not overlap or self.progress.episodes >= total:
                    self.learn({})
                if self.due(self.config.eval.every, self.evaluated):
                    self.evaluate()
                if self.due(self.config.checkpoint.every, self.attempted):
                    self.save()
                if self.progress.episodes >= total:
                    break
                self.round()
        except Exception as error:  # an environment may raise whatever it likes
            self.save()
            saved = "saved" if self.saved == self.progress else "NOT saved"
            expected = isinstance(error, (cli.Interrupted, StoppedError))
            what = error if expected else f"{type(error).__name__} (the traceback follows)"
            self.display.say(f"{what}: {saved}; continue with --resume {self.run_dir}")
            raise
        if (self.progress.episodes, self.learner.updates, self.evaluated) == before:
            self.display.say(
                f"nothing to do: {total} of {total} episodes driven; --collect.episodes takes more"
            )
            return
        if self.saved != self.progress:
            self.save()
        if self.saved != self.progress:
            raise StoppedError("the end of the run could not be saved")

    def due(self, every: int, last: int) -> bool:
        """Whether a multiple of ``every`` episodes has been passed since ``last``."""
        return every > 0 and self.progress.episodes // every > last // every

    def round(self) -> None:
        """Collect an episode in every environment, learn from them, report."""
        config, before = self.config, self.progress.episodes
        count = min(config.collect.num_envs, config.collect.episodes - before)
        numbers = range(before, before + count)
        noise_std = exploration_noise(before - config.collect.seed_episodes, config.collect)
        restarts = self.pool.restarts
        metrics: dict[str, float] = {"plan/noise_std": noise_std}
        if config.collect.overlap:
            driven = self.drive_and_learn(numbers, noise_std, metrics)
        else:
            self.display.phase("driving")
            with self.learner.planning() as params:
                driven = self.drive(params, numbers, noise_std, self.interrupt)
        if self.pool.restarts > restarts:
            self.display.say(
                f"warning: {self.pool.restarts - restarts} environment workers died or did not "
                "answer; new ones drove their episodes again"
            )
        start = time.perf_counter()
        for number, result in zip(numbers, driven, strict=True):
            self.learner.add(result.episode)
            self.unsaved[number] = result.episode
        try:
            self.save_episodes()
        except OSError as error:
            self.display.say(f"warning: cannot save an episode, will try again: {error.strerror}")
        metrics["time/save_s"] = time.perf_counter() - start
        steps = [len(result.episode) for result in driven]
        seeding = max(0, config.collect.seed_episodes - before)
        self.progress = dataclasses.replace(
            self.progress,
            episodes=before + count,
            env_steps=self.progress.env_steps + sum(steps),
            learning_steps=self.progress.learning_steps + sum(steps[seeding:]),
            seconds=time.monotonic() - self.clock,
        )
        try:
            self.check_scores(driven)
            if not config.collect.overlap:
                self.learn(metrics)
        finally:
            # Even on an interrupt: the episodes are driven, and the updates that they are still
            # owed come on resuming.
            self.report(numbers, driven, metrics)
        if self.learner.updates and not self.said_compiling:
            self.said_compiling = True
            seconds, spared = cli.compile_cost()
            cached = jax.config.jax_compilation_cache_dir is not None
            self.display.say(
                f"compiled for {seconds:.0f} s in all; "
                + (
                    f"{spared} programs came from the cache"
                    if cached
                    else "where JAX_COMPILATION_CACHE_DIR is set, the next start need not"
                )
            )

    def drive(
        self,
        params: Params,
        numbers: Sequence[int],
        noise_std: float,
        interrupt: Callable[[], None],
    ) -> list[Driven]:
        """Drive the training episodes of these numbers."""
        return drive(
            params,
            self.pool,
            [self.job(number) for number in numbers],
            config=self.config,
            noise_std=noise_std,
            groups=2 if self.config.collect.overlap else 1,
            on_decision=interrupt,
        )

    def drive_and_learn(
        self, numbers: Sequence[int], noise_std: float, metrics: dict[str, float]
    ) -> list[Driven]:
        """Drive in a thread with the parameters of now, and meanwhile learn what is owed."""
        over = threading.Event()

        def interrupt() -> None:
            self.interrupt()
            if over.is_set():
                raise StoppedError("learning has stopped")

        # A copy, as an update donates its own; on one device, though updates may be on several.
        params = jax.tree.map(jnp.copy, self.learner.state.params)
        params = jax.device_put(params, jax.local_devices()[0])
        driving = self.executor.submit(self.drive, params, numbers, noise_std, interrupt)
        try:
            self.learn(metrics)
        except BaseException:
            over.set()
            raise
        self.display.phase("driving")
        return driving.result()

    def report(
        self, numbers: Sequence[int], driven: Sequence[Driven], metrics: dict[str, float]
    ) -> None:
        """Log the episodes of a round with the metrics of the learning beside or after it."""
        for number, result in zip(numbers, driven, strict=True):
            record = {
                "episode": number,
                "episode/return": result.episode.episode_return,
                "episode/length": len(result.episode),
                "episode/terminated": result.episode.terminated,
                "episode/seed": result.episode.seed,
                "plan/predicted_return": result.predicted_return,
                "time/plan_ms": 1e3 * float(np.median(result.plan_seconds)),
                "time/plan_s": float(np.sum(result.plan_seconds)),
                "time/env_ms": 1e3 * float(np.median(result.env_seconds)),
                "time/env_s": float(np.sum(result.env_seconds)),
                "time/seconds": self.progress.seconds,
                **_memory(),
                "total/env_steps": self.progress.env_steps,
                "total/updates": self.learner.updates,
                **metrics,
            }
            self.log.episode(record)
            self.display.episode(record)

    def job(self, number: int) -> Job:
        """Training episode ``number``: its seed and key follow from the run's seed alone."""
        seed = np.random.default_rng([1, self.config.seed, number]).integers(2**31 - 1)
        return Job(int(seed), jax.random.fold_in(self.drive_key, number))

    def learn(self, metrics: dict[str, float]) -> None:
        """Catch up with the update-to-data ratio, adding the means of the updates' metrics."""
        # The ratio is a decimal: a hair is added so that 0.1 of 30 steps is 3, however it rounds.
        due = int(self.progress.learning_steps * self.config.learn.updates_per_step + 1e-6)
        owed = due - self.learner.updates
        if owed <= 0:
            return
        compiling = "" if self.said_compiling else " (the first compiles)"
        self.display.phase(f"learning: {owed} updates{compiling}")
        each: list[dict[str, float]] = []
        start = time.perf_counter()
        try:
            self.learner.learn(due, each, self.interrupt)
        finally:
            if each:
                metrics |= _means(each)
                metrics["time/learn_s"] = time.perf_counter() - start
                metrics["time/update_ms"] = 1e3 * metrics["time/learn_s"] / len(each)
        if each:
            seconds = time.monotonic() - self.clock
            self.progress = dataclasses.replace(self.progress, seconds=seconds)

    def check_scores(self, driven: Sequence[Driven]) -> None:
        """Raises StoppedError if the planner had no finite score for too many episodes in a row."""
        for result in driven:
            finite = np.isfinite(result.predicted_return)
            self.unscored = 0 if finite else self.unscored + 1
        limit = self.config.learn.nonfinite_limit
        if self.unscored >= limit:
            raise StoppedError(
                f"the planner's scores were not finite in {self.unscored} episodes in a row, the "
                f"last of them episode {self.progress.episodes}"
            )

    def evaluate(self) -> None:
        """Drive fixed episodes without exploration noise."""
        config = self.config
        self.display.phase(f"evaluating on {config.eval.episodes} episodes")
        with self.learner.planning() as params:
            driven = evaluate(
                params,
                config,
                episodes=config.eval.episodes,
                num_envs=config.collect.num_envs,
                make=self.make,
                on_decision=self.interrupt,
            )
        self.evaluated = self.progress.episodes
        returns = [result.episode.episode_return for result in driven]
        self.log.evaluation(
            {
                "episode": self.progress.episodes - 1,
                "eval/return": float(np.mean(returns)),
                "eval/length": float(np.mean([len(result.episode) for result in driven])),
                "returns": returns,
            }
        )
        self.display.say(
            f"evaluation after {self.progress.episodes} episodes: mean return "
            f"{np.mean(returns):.1f} over {len(returns)}"
        )

    def save(self) -> None:
        """Write a checkpoint and drop the episodes that left the replay.

        Where that fails, as on a full disk, the run goes on and the last checkpoint stays.
        """
        self.display.phase("saving")
        first = self.progress.episodes - self.config.replay.capacity
        try:
            self.save_episodes()
            self.digests = {n: digest for n, digest in self.digests.items() if n >= first}
            checkpoint.save(
                self.run_dir,
                self.learner.state,
                self.progress,
                keep=self.config.checkpoint.keep,
                replay=self.digests,
            )
        except OSError as error:
            self.display.say(f"warning: cannot save a checkpoint: {error}; the last one stays")
            self.attempted = self.progress.episodes
            return
        self.saved, self.attempted = self.progress, self.progress.episodes
        oldest = int(checkpoint.checkpoints(self.run_dir)[0].name) - self.config.replay.capacity
        checkpoint.prune_episodes(self.run_dir, before=oldest)

    def save_episodes(self) -> None:
        """Write the episodes that are not yet on disk.

        Raises:
            OSError: if that fails; those that are not written stay to be written.
        """
        while self.unsaved:
            number = min(self.unsaved)
            episode = self.unsaved[number]
            self.digests[number] = checkpoint.save_episode(self.run_dir, number, episode)
            del self.unsaved[number]

    def say_cost(self, example: Observation) -> None:
        """Say what a decision costs, if it is a CPU that pays."""
        if jax.default_backend() != "cpu":
            return
        seconds = []
        for _ in range(2):  # the first call compiles
            start = time.perf_counter()
            with self.learner.planning() as params:
                plan = plan_batch(
                    params,
                    jax.tree.map(lambda x: np.stack([x] * self.pool.size), example),
                    jax.random.split(self.drive_key, self.pool.size),
                    np.zeros(self.pool.size, np.int32),
                    np.float32(0),
                    first_carries(self.pool.size, self.config),
                    config=self.config,
                )
                jax.block_until_ready(plan)
            seconds.append(time.perf_counter() - start)
        self.display.say(
            f"note: a decision costs {seconds[-1]:.1f} s on this CPU; --preset cpu is sized for it"
        )


def _memory() -> dict[str, float]:
    """Memory that this process holds, and that it has held at most on the device, in GB."""
    used = {}
    statm = Path("/proc/self/statm")
    if statm.exists():
        used["memory/host_gb"] = (
            int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
        )
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        used["memory/device_gb"] = stats["peak_bytes_in_use"] / 1e9
    return used


def _means(metrics: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over several updates, of those where it is finite."""
    means = {}
    for name in metrics[0]:
        values = np.array([m[name] for m in metrics])
        if np.isfinite(values).any():
            means[name] = float(values[np.isfinite(values)].mean())
    return means


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """The command line, on top of the preset or of the run that it continues.

    Raises:
        UsageError: if it cannot be understood.
    """
    chosen = _value_of("--preset", argv)
    resumed = _value_of("--resume", argv)
    if chosen is not None and resumed is not None:
        raise UsageError("--preset and --resume exclude each other: a run keeps its settings")
    given = _value_of("--init-from", argv)
    if given is not None and resumed is not None:
        raise UsageError("--init-from and --resume exclude each other: a run has its parameters")
    if resumed:
        base = checkpoint.load_config(Path(resumed))
    elif given and chosen is None:
        base = checkpoint.open_agent(Path(given)).config
    else:
        base = default_config(_value_of("--env", argv), chosen)
    arguments = cli.parse(
        Arguments,
        argv,
        default=Arguments(config=base),
        prog="python -m valdi_jax.train",
        description="Train a Valdi agent.",
    )
    if resumed and arguments.run_dir:
        raise UsageError("--run-dir and --resume exclude each other: a run stays where it is")
    return arguments


def _value_of(option: str, argv: Sequence[str]) -> str | None:
    """The value given to an option that decides the defaults of all others."""
    for token, following in zip(argv, [*argv[1:], None], strict=True):
        if token.replace("_", "-") == option:
            return following
        if token.replace("_", "-").startswith(option + "="):
            return token.split("=", 1)[1]
    return None


def _refuse_changes(old: Config, new: Config) -> None:
    """Raises UsageError if a run cannot go on with another configuration than it has."""
    for name, theirs, ours in _differences(to_dict(old), to_dict(new)):
        if not name.startswith(_CHANGEABLE):
            raise UsageError(f"cannot resume with another {name}: the run has {theirs}, not {ours}")


def _differences(old: dict, new: dict, path: str = "") -> Iterator[tuple[str, object, object]]:
    for name, value in old.items():
        if isinstance(value, dict):
            yield from _differences(value, new[name], f"{path}{name}.")
        elif value != new[name]:
            yield path + name, value, new[name]


def main(argv: Sequence[str]) -> int:
    """The command."""
    arguments = parse_arguments(argv)
    cli.cache_compilations()
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    run_dir = (
        arguments.resume
        or arguments.run_dir
        or Path("runs") / f"{arguments.config.env.name.replace(':', '-').replace('/', '-')}-{stamp}"
    )
    try:
        train(
            arguments.config,
            run_dir,
            resume=arguments.resume is not None,
            init_from=arguments.init_from,
        )
    except cli.Interrupted:
        return 130
    return 0


if __name__ == "__main__":
    cli.run(main)
