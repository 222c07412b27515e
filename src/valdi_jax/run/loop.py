"""The loop of training: collect a round, learn what is owed, evaluate, save."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from valdi_jax import cli
from valdi_jax.config import Config, leaves, to_dict, validate
from valdi_jax.data.rollout import Rollout, first_carries, plan_batch
from valdi_jax.data.source import SOURCES, Interrupt, Progress, Source
from valdi_jax.errors import StoppedError, UsageError
from valdi_jax.run import checkpoint
from valdi_jax.run.learner import Learner, check
from valdi_jax.run.reporter import Reporter
from valdi_jax.run.saver import Saver
from valdi_jax.types import AgentState
from valdi_jax.updates import init_state, start_from

# What may differ between a run and its continuation: how long it goes on, what it reports, and
# where it computes.
_CHANGEABLE = (
    *("collect.episodes", "collect.worker_timeout", "eval.", "checkpoint."),
    *("replay.placement", "learn.updates_per_dispatch", "learn.devices"),
)


def train(
    config: Config,
    run_dir: Path,
    *,
    make: Callable[..., gym.Env],
    resume: bool = False,
    init_from: Path | None = None,
    console: Console | None = None,
) -> AgentState:
    """See `valdi_jax.train.train`."""
    # How large an action is follows from the source, which the configuration comes before.
    validate(config.replace(model={"action_dim": 1}))
    source = SOURCES[config.collect.source](config, make)
    config = source.config
    validate(config)
    check(source.example, config)
    with contextlib.ExitStack() as stack:
        stack.callback(source.close)
        _prepare(run_dir, source, resume=resume, init_from=init_from)
        interrupt = stack.enter_context(cli.interruptible())
        stack.enter_context(checkpoint.lock(run_dir))
        recovered = checkpoint.recover(run_dir) if resume or init_from else checkpoint.Recovered()
        if recovered.checkpoint is None:  # also where a run ended before its first checkpoint
            state, progress = _first_state(source), Progress()
        else:
            state, progress = checkpoint.load(recovered.checkpoint, source.example, config)
        if config.collect.episodes < progress.episodes:
            raise UsageError(
                f"--collect.episodes is {config.collect.episodes}, but the run has collected "
                f"{progress.episodes} already"
            )
        reporter = Reporter(run_dir, config, progress, console or Console())
        stack.callback(reporter.close)
        reporter.say(f"run directory: {run_dir}")
        for sentence in recovered.sentences:
            reporter.say(f"warning: {sentence}")
        if resume:
            new = checkpoint.options_since(run_dir)
            if new:
                reporter.say(f"note: at their defaults, as the run is older: {', '.join(new)}")
            checkpoint.save_config(run_dir, config)
        learner = Learner(state, source.example, config=config, run_dir=run_dir, say=reporter.say)
        for number in recovered.digests:
            episode = checkpoint.load_episode(run_dir, number, source.example, config)
            learner.restore(episode)
        saver = Saver(run_dir, config, learner, progress, recovered, say=reporter.say)
        if (devices := jax.device_count()) > 1:
            reporter.say(f"planning on {devices} devices, learning on {learner.devices}")
        _say_cost(source, learner, reporter)
        stack.enter_context(reporter.live())
        _loop(config, source, learner, saver, reporter, progress, interrupt)
    return learner.state


def _loop(
    config: Config,
    source: Source,
    learner: Learner,
    saver: Saver,
    reporter: Reporter,
    progress: Progress,
    interrupt: Interrupt,
) -> None:
    """Run to the end, or to an interrupt; leave a checkpoint either way."""
    total, overlap = config.collect.episodes, config.collect.overlap
    before = progress.episodes, learner.updates, reporter.evaluated

    def due(every: int, last: int) -> bool:
        """Whether a multiple of ``every`` episodes has been passed since ``last``."""
        return every > 0 and progress.episodes // every > last // every

    def learn(metrics: dict[str, float]) -> None:
        with reporter.learning(source.due(progress) - learner.updates, metrics) as each:
            learner.learn(source.due(progress), each, interrupt)

    try:
        while True:
            # What an interrupt left undone, or, collecting and learning at once, the last round.
            if not overlap or progress.episodes >= total:
                learn({})
            if due(config.eval.every, reporter.evaluated):
                reporter.phase(f"evaluating on {config.eval.episodes} episodes")
                with learner.planning() as params:
                    reporter.evaluation(source.evaluate(params, interrupt))
            if due(config.checkpoint.every, saver.attempted):
                reporter.phase("saving")
                saver.save()
            if progress.episodes >= total:
                break

            numbers = source.next_round(progress)
            metrics: dict[str, float] = {}
            if overlap:
                rollouts = _collect_beside(learn, source, learner, numbers, metrics, interrupt)
            else:
                reporter.phase("collecting")
                with learner.planning() as params:
                    rollouts = source.collect(params, numbers, interrupt)
            for rollout in rollouts:
                learner.add(rollout.episode)
            metrics["time/save_s"] = saver.add(numbers, rollouts)
            source.count(progress, rollouts)
            reporter.tick()
            for sentence in source.notices():
                reporter.say(sentence)
            try:
                reporter.check_scores(rollouts)
                if not overlap:
                    learn(metrics)
            finally:
                # Even on an interrupt: the episodes are there, and the updates that they are still
                # owed come on resuming.
                reporter.episodes(numbers, rollouts, metrics, learner.updates)
    except Exception as error:  # an environment may raise whatever it likes
        reporter.phase("saving")
        saver.save()
        saved = "saved" if saver.complete else "NOT saved"
        expected = isinstance(error, (cli.Interrupted, StoppedError))
        what = error if expected else f"{type(error).__name__} (the traceback follows)"
        reporter.say(f"{what}: {saved}; continue with --resume {saver.run_dir}")
        raise
    if (progress.episodes, learner.updates, reporter.evaluated) == before:
        reporter.say(
            f"nothing to do: {total} of {total} episodes collected; --collect.episodes takes more"
        )
        return
    if not saver.complete:
        saver.save()
    if not saver.complete:
        raise StoppedError("the end of the run could not be saved")


def _first_state(source: Source) -> AgentState:
    key = jax.random.split(jax.random.key(source.config.seed))[0]
    return init_state(key, source.example, config=source.config)


def _prepare(run_dir: Path, source: Source, *, resume: bool, init_from: Path | None) -> None:
    """Make the run directory, or see that the run in it may go on."""
    config = source.config
    if resume and init_from is not None:
        raise UsageError("a run that is resumed has its parameters: init_from is for a new one")
    if resume:
        theirs, ours = (
            dict(leaves(to_dict(each))) for each in (checkpoint.load_config(run_dir), config)
        )
        for name, value in theirs.items():
            if value != ours[name] and not name.startswith(_CHANGEABLE):
                raise UsageError(
                    f"cannot resume with another {name}: the run has {value}, not {ours[name]}"
                )
    elif init_from is not None:
        given = checkpoint.open_agent(init_from).load(source.example, config=config)
        checkpoint.create_run(run_dir, config, start_from(_first_state(source), given))
    else:
        checkpoint.create_run(run_dir, config)


def _collect_beside(
    learn: Callable[[dict[str, float]], None],
    source: Source,
    learner: Learner,
    numbers: Sequence[int],
    metrics: dict[str, float],
    interrupt: Interrupt,
) -> list[Rollout]:
    """Collect in a thread with the parameters of now, and meanwhile learn what is owed."""
    over = threading.Event()

    def stop() -> None:
        interrupt()
        if over.is_set():
            raise StoppedError("learning has stopped")

    # A copy, as an update donates its own; on one device, though updates may be on several.
    params = jax.tree.map(jnp.copy, learner.state.params)
    params = jax.device_put(params, jax.local_devices()[0])
    with ThreadPoolExecutor(1, "collect") as executor:
        collecting = executor.submit(source.collect, params, numbers, stop)
        try:
            learn(metrics)
        except BaseException:
            over.set()
            raise
        return collecting.result()


def _say_cost(source: Source, learner: Learner, reporter: Reporter) -> None:
    """Say what a decision costs, if it is a CPU that pays much."""
    config = source.config
    costly = config.planner.candidates * config.planner.iterations >= 2000
    if not costly or jax.default_backend() != "cpu":
        return
    size = config.collect.num_envs
    seconds = []
    for _ in range(2):  # the first call compiles
        start = time.perf_counter()
        with learner.planning() as params:
            plan = plan_batch(
                params,
                jax.tree.map(lambda x: np.stack([x] * size), source.example),
                jax.random.split(jax.random.key(0), size),
                np.zeros(size, np.int32),
                np.float32(0),
                first_carries(size, config),
                config=config.graph,
            )
            jax.block_until_ready(plan)
        seconds.append(time.perf_counter() - start)
    reporter.say(
        f"note: a decision costs {seconds[-1]:.1f} s on this CPU; --preset cpu is sized for it"
    )
