"""The training loop: collect a round, make the updates due, evaluate, save."""

from __future__ import annotations

import contextlib
import functools
import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import jax
from rich.console import Console

from valdi_jax import cli
from valdi_jax.config import Config, leaves, require_terms, to_dict, validate
from valdi_jax.data.collector import Interrupt
from valdi_jax.data.episode import Episode
from valdi_jax.data.recorded import GIVEN, digest
from valdi_jax.data.replay import Replay
from valdi_jax.data.source import SOURCES, Progress, Source
from valdi_jax.envs import imported_modules, make_env
from valdi_jax.errors import StoppedError, UsageError
from valdi_jax.losses import trains_encoder
from valdi_jax.model import params_shapes
from valdi_jax.run import checkpoint, npz, rundir, stored
from valdi_jax.run.learner import Learner, check
from valdi_jax.run.notes import notes
from valdi_jax.run.processes import Processes, start
from valdi_jax.run.reporter import Reporter
from valdi_jax.run.rounds import Rounds
from valdi_jax.run.saver import Saver
from valdi_jax.run.video import record_video
from valdi_jax.types import AgentState, Params
from valdi_jax.updates import fit_scalers, init_state, observe, start_from

# What may change on resuming: the length of the run, its reports, and its hardware.
_CHANGEABLE = {
    *("collect.episodes", "collect.worker_timeout", "collect.cluster", "collect.actors"),
    *("replay.placement", "learn.updates_per_dispatch", "learn.devices"),
    *("learn.heartbeat", "learn.watchdog"),
}
_CHANGEABLE_SECTIONS = ("eval.", "checkpoint.")
# Of each start, and of each process: a run does not keep them.
_OF_THE_START = {"processes": 1, "coordinator": "", "rank": -1}


def train(
    config: Config,
    run_dir: Path,
    *,
    make: Callable[..., gym.Env],
    resume: bool = False,
    init_from: Path | None = None,
    console: Console | None = None,
    on_record: Callable[[dict[str, Any]], object] | None = None,
    data: Iterable[Any] | None = None,
) -> AgentState:
    """See `valdi_jax.train.train`."""
    start(config.learn)
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(Processes(config.learn.watchdog))
        if resume and init_from is not None:
            raise UsageError("a run that is resumed has its parameters: init_from is for a new one")
        source = _prepared(config.replace(learn=_OF_THE_START), run_dir, make, resume, data)
        stack.callback(source.close)
        config = source.config
        given = None if init_from is None else _given(source, init_from)
        trained = given.config.model.networks if given else config.model.networks if resume else ()
        require_terms(config, trained)
        recorded = source.recorded()
        first = None if given is None else _having_seen(recorded, given, config)
        _check_data(recorded, config, run_dir if resume else None, fresh=given is None)
        signalled = stack.enter_context(cli.interruptible())
        if processes.follows:
            return _follow(source, recorded, processes, signalled)

        def interrupt() -> None:
            signalled()
            processes.check()

        lock = stack.enter_context(rundir.lock(run_dir))
        if resume:
            _may_resume(run_dir, config)
        # Here, as processes inherit what the main thread ignores; before anything is written.
        collector = source.open()
        stack.callback(collector.close)
        if not resume:
            made_by = None if make is make_env else _name(make)
            checkpoint.create_run(*(run_dir, config, first), made_by=made_by, data=digest(recorded))
        known = resume or init_from is not None
        recovered = checkpoint.recover(run_dir) if known else checkpoint.Recovered()
        if processes.leads:
            processes.tell("begin", _beginning(config, run_dir, recorded, recovered))
        state, progress = _begin(source, recorded, recovered.checkpoint)
        under_way = []
        if recovered.checkpoint is not None:
            under_way = checkpoint.load_rounds(recovered.checkpoint, source.example, config)
        if config.collect.episodes < progress.episodes:
            raise UsageError(
                f"--collect.episodes is {config.collect.episodes}, but the run has collected "
                f"{progress.episodes} already"
            )

        def film(params: Params, path: Path) -> None:
            record_video(params, config, path, make=make, on_decision=interrupt)

        reporter = Reporter(run_dir, config, progress, console or Console(), film, on_record)
        stack.callback(reporter.close)
        reporter.say(f"run directory: {run_dir}")
        for sentence in filter(None, [lock.warning, *recovered.sentences]):
            reporter.say(f"warning: {sentence}")
        if init_from is not None:
            for name in sorted(set(config.model.networks) - set(trained)):
                reporter.say(f"note: {name} starts untrained: {init_from} has none")
        if resume:
            new = rundir.options_since(run_dir)
            if new:
                reporter.say(f"note: at their defaults, as the run is older: {', '.join(new)}")
            rundir.save_config(run_dir, config)
        learner = Learner(
            *(state, source.example),
            config=config,
            run_dir=run_dir,
            say=reporter.say,
            recorded=recorded,
            processes=processes,
        )
        for number in recovered.digests:
            episode = npz.load_episode(run_dir, number, source.example, config)
            learner.restore(episode)
        for sentence in notes(source, learner, processes, recorded):
            reporter.say(sentence)
        stack.enter_context(reporter.live())
        rounds = Rounds(source, learner, collector, under_way)
        saver = Saver(
            *(lock, run_dir, config, learner, progress, rounds, recovered), say=reporter.say
        )
        _loop(config, source, learner, rounds, saver, reporter, progress, interrupt)
    return learner.local


def _prepared(
    config: Config,
    run_dir: Path,
    make: Callable[..., gym.Env],
    resume: bool,
    data: Iterable[Any] | None,
) -> Source:
    """The source of episodes, whose configuration is complete and checked.

    Raises:
        UsageError: as `train`.
    """
    if resume:
        _belongs(run_dir, make)
        theirs = rundir.load_config(run_dir).env.name
        if config.env.name != theirs:
            raise UsageError(
                f"cannot resume with another environment: the run has {theirs}, not "
                f"{config.env.name}"
            )
    if data is not None:
        config = config.replace(collect={"data": GIVEN})
    # The source determines the action size, but takes a configuration first.
    validate(config.replace(model={"action_dim": 1}))
    source = SOURCES[config.collect.source](config, make, data)
    try:
        validate(source.config)
        check(source.example, source.config)
    except BaseException:
        source.close()
        raise
    return source


class _Given(NamedTuple):
    """What a run starts from."""

    state: AgentState
    config: Config  # that the agent was trained with


def _given(source: Source, init_from: Path) -> _Given:
    """A fresh agent with the parameters of another one.

    Raises:
        UsageError: if there is none, or it does not fit.
    """
    config, fresh = source.config, _first_state(source)
    agent = stored.open_agent(init_from)
    try:
        params = agent.load(source.example, config=config, fresh=fresh.params)
    except UsageError as error:
        raise UsageError(f"{error}{_differences(agent.config, config)}") from error
    return _Given(start_from(fresh, params), agent.config)


def _having_seen(recorded: Sequence[Episode], given: _Given, config: Config) -> AgentState:
    """The given agent, its normaliser updated with recorded episodes that are new to it."""
    named, state = config.collect.data, given.state
    # As far as names tell.
    known = named != GIVEN and named == given.config.collect.data
    if trains_encoder(config) and not known:
        for episode in recorded:
            state = observe(state, episode.observations.vector)
    return state


def _begin(
    source: Source, recorded: Sequence[Episode], found: Path | None
) -> tuple[AgentState, Progress]:
    """The agent and its counters, from a checkpoint if there is one."""
    config = source.config
    if found is not None:
        return checkpoint.load(found, source.example, config)
    # Also if a run ended before its first checkpoint.
    state = fit_scalers(_first_state(source), recorded, config=config)
    for episode in recorded:
        state = observe(state, episode.observations.vector)
    return state, Progress()


def _beginning(
    config: Config, run_dir: Path, recorded: Sequence[Episode], recovered: checkpoint.Recovered
) -> str:
    """What other processes have to know to begin as this one does."""
    found = recovered.checkpoint
    return json.dumps(
        {
            "config": to_dict(config),
            "run_dir": str(run_dir.absolute()),
            "checkpoint": found and str(found.absolute()),
            "replay": list(recovered.digests),
            "data": digest(recorded),
        }
    )


def _follow(
    source: Source,
    recorded: Sequence[Episode],
    processes: Processes,
    interrupt: Interrupt,
) -> AgentState:
    """Learn as the first process says, which does all else.

    Raises:
        UsageError: if this process has other options or data, or cannot read the run's directory.
    """
    config = source.config
    begun = json.loads(processes.receive(interrupt).body)
    theirs, ours = dict(leaves(begun["config"])), dict(leaves(to_dict(config)))
    for name, value in json.loads(json.dumps(ours)).items():
        if value != theirs[name]:
            raise UsageError(
                f"process {processes.rank} has another {name} than process 0: {value}, not "
                f"{theirs[name]}"
            )
    if digest(recorded) != begun["data"]:
        raise UsageError(f"process {processes.rank} has other recorded data than process 0")
    run_dir, found = Path(begun["run_dir"]), begun["checkpoint"]
    if found and not Path(found).is_dir():
        raise UsageError(f"process {processes.rank} has no {found}: all need the run's directory")
    state, _ = _begin(source, recorded, found and Path(found))
    learner = Learner(
        *(state, source.example),
        config=config,
        run_dir=run_dir,
        say=lambda sentence: None,
        recorded=recorded,
        processes=processes,
    )
    for number in begun["replay"]:
        learner.restore(npz.load_episode(run_dir, number, source.example, config))
    learner.follow(interrupt)
    return learner.local


def _loop(
    config: Config,
    source: Source,
    learner: Learner,
    rounds: Rounds,
    saver: Saver,
    reporter: Reporter,
    progress: Progress,
    interrupt: Interrupt,
) -> None:
    """Run to the end, or to an interrupt; save a checkpoint either way."""
    total, lag = config.collect.episodes, config.collect.lag
    before = progress.episodes, learner.updates, reporter.evaluated

    def due(every: int, last: int) -> bool:
        """Whether a multiple of ``every`` episodes has been passed since ``last``."""
        return every > 0 and progress.episodes // every > last // every

    def learn(metrics: dict[str, float]) -> None:
        with reporter.learning(source.due(progress) - learner.updates, metrics) as each:
            learner.learn(source.due(progress), each, interrupt)

    try:
        while True:
            # Updates that an interrupt left undone.
            if not lag or progress.episodes >= total:
                learn({})
            if due(config.eval.every, reporter.evaluated):
                reporter.phase(f"evaluating on {config.eval.episodes} episodes")
                with learner.planning() as params:
                    reporter.evaluation(source.evaluate(params, interrupt), params)
            if due(config.checkpoint.every, saver.attempted):
                reporter.phase("saving")
                saver.save()
            if progress.episodes >= total:
                break

            metrics: dict[str, float] = {}
            if lag:
                rounds.start(progress)
                learn(metrics)
            numbers = rounds.next(progress)
            if config.collect.source != "data":
                reporter.collecting(numbers)
            rollouts = rounds.finish(progress, metrics, interrupt)
            for rollout in rollouts:
                learner.add(rollout.episode)
            if rollouts:
                metrics["plan/noise_std"] = source.noise_std(numbers[0])
                metrics["time/save_s"] = saver.add(numbers, rollouts)
            source.count(progress, numbers, rollouts)
            rounds.counted()
            reporter.tick()
            for sentence in [*source.notices(), *rounds.notices()]:
                reporter.say(sentence)
            try:
                reporter.check_scores(rollouts)
                if not lag or progress.episodes >= total:
                    learn(metrics)
            finally:
                # Also on an interrupt: the episodes exist, and their missing updates follow on
                # resuming.
                if rollouts:
                    reporter.episodes(numbers, rollouts, metrics, learner.updates)
                else:
                    reporter.epoch(numbers[0], metrics, learner.updates)
    except Exception as error:  # an environment may raise anything
        reporter.phase("saving")
        try:
            saver.save()
        except Exception as second:  # must not replace the first
            reporter.say(f"warning: cannot save a checkpoint: {second}; the last one stays")
        saved = "saved" if saver.complete else "NOT saved"
        expected = isinstance(error, (cli.Interrupted, StoppedError))
        what = error if expected else f"{type(error).__name__} (the traceback follows)"
        reporter.say(f"{what}: {saved}; {_how_to_resume(saver.run_dir)}")
        raise
    if (progress.episodes, learner.updates, reporter.evaluated) == before:
        reporter.say(
            f"nothing to do: {total} of {total} {config.unit}s done; --collect.episodes takes more"
        )
        return
    if not saver.complete:
        saver.save()
    if not saver.complete:
        raise StoppedError("the end of the run could not be saved")


def _how_to_resume(run_dir: Path) -> str:
    known = None
    with contextlib.suppress(UsageError):  # a damaged identity hides no other error
        known = rundir.identity(run_dir)
    if known and known["made_by"]:
        return f"continue with the same program and train({str(run_dir)!r}, resume=True)"
    imports = " ".join(["", "--env.import", *modules]) if (modules := imported_modules()) else ""
    return f"continue with python -m valdi_jax.train --resume {shlex.quote(str(run_dir))}{imports}"


def _first_state(source: Source) -> AgentState:
    key = jax.random.split(jax.random.key(source.config.seed))[0]
    # Fails now, not when the run resumes, if a network of the user's cannot be traced.
    params_shapes(source.example, config=source.config)
    return init_state(key, source.example, config=source.config)


def _belongs(run_dir: Path, make: Callable[..., gym.Env]) -> None:
    """Raise UsageError if a run is of other environments than this package makes."""
    known = rundir.identity(run_dir)
    if known and known["made_by"] and make is make_env:
        raise UsageError(
            f"{run_dir} was trained on environments that {known['made_by']} makes: continue it "
            "from that program"
        )


def _check_data(
    recorded: Sequence[Episode], config: Config, resumed: Path | None, *, fresh: bool
) -> None:
    """Raise UsageError if recorded episodes are missing, too short, or not the resumed run's."""
    known = rundir.identity(resumed) if resumed else None
    began = known["data"] if known else None
    if began and began != digest(recorded) and began != digest(recorded, ends=False):
        raise UsageError(f"the recorded data are not those that {resumed} began with")
    if config.diffuses_plans and not recorded and fresh and not resumed:
        raise UsageError("Diffuser's normalisers need --data minari:ID, recorded episodes")
    if config.collect.source == "data":
        longest = max(len(episode) for episode in recorded)
        replay = Replay(config, longest=longest)
        for episode in recorded:
            replay.give(episode)
        if not replay.ready:
            needed = config.segment_steps + config.diffuses_plans  # it leaves the last state out
            raise UsageError(
                f"no recorded episode has {needed} steps, which a training segment takes: the "
                f"longest has {longest}"
            )


def _may_resume(run_dir: Path, config: Config) -> None:
    """Raise UsageError if a run cannot resume with this configuration."""
    theirs, ours = (dict(leaves(to_dict(each))) for each in (rundir.load_config(run_dir), config))
    for name, value in theirs.items():
        free = name in _CHANGEABLE or name.startswith(_CHANGEABLE_SECTIONS)
        if value != ours[name] and not free:
            raise UsageError(
                f"cannot resume with another {name}: the run has {value}, not {ours[name]}"
            )


def _differences(theirs: Config, ours: Config) -> str:
    """The environment and the first few sizes of another agent that differ, for a message."""
    model = dict(leaves(to_dict(ours)["model"]))
    options = [
        f"--model.{name.replace('_', '-')} {value}"
        for name, value in leaves(to_dict(theirs)["model"])
        if value != model[name] and not name.endswith("_dim")
    ]
    said = [f"of {theirs.env.name}"] if theirs.env.name != ours.env.name else []
    said += [f"with {' '.join(options[:4])}"] if options else []
    return f" (it is {', '.join(said)})" if said else ""


def _name(make: Callable[..., gym.Env]) -> str:
    while isinstance(make, functools.partial):
        make = make.func
    return f"{make.__module__}.{getattr(make, '__qualname__', type(make).__qualname__)}"
