"""Train an agent: ``python -m valdi_jax.train --env carracing``.

Training code is imported lazily, because environment processes import this module too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import gymnasium as gym
import tyro

from valdi_jax import cli
from valdi_jax.config import Config, validate
from valdi_jax.envs import import_modules, make_env
from valdi_jax.errors import UsageError
from valdi_jax.presets import default_config

if TYPE_CHECKING:
    from rich.console import Console

    from valdi_jax.types import AgentState


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line of the training command."""

    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Defaults to start from: paper (every value of the paper's Table 3), cpu (CarRacing in two
    hours of one core), tiny (a smoke run of about a minute), pendulum, mountaincar, lunarlander,
    bipedalwalker, bipedalwalker-hardcore, dmc, maze, maze:medium, maze:large, or gym (any other
    environment); valdi-q, mbdpo, tdmpc2, mbdpo-tdmpc2 and diffuser are other methods, on any one
    (diffuser: of vectors, from recorded data, --data). By default the environment's own: paper for
    carracing."""
    run_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory of the run; by default a new one under runs/."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Run directory to resume from its last checkpoint."""
    init_from: Annotated[Path | None, tyro.conf.arg(metavar="AGENT")] = None
    """Start a new run from the parameters of a run, a checkpoint, an exported agent or a bundled
    one; without --preset, with its settings as well. Networks that it lacks start untrained."""
    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="env.import", metavar="MODULE")] = ()
    """Modules to import first, which register environments, world models, planners or terms."""
    log: tuple[Literal["wandb"], ...] = ()
    """Where to log besides the run directory: wandb (Weights & Biases, extra wandb)."""
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


def train(
    config: Config,
    run_dir: Path | str,
    *,
    resume: bool = False,
    init_from: Path | str | None = None,
    make: Callable[..., gym.Env] = make_env,
    console: Console | None = None,
    on_record: Callable[[dict[str, Any]], object] | None = None,
    data: Iterable[Any] | None = None,
) -> AgentState:
    """Train until ``config.collect.episodes`` episodes are collected, or epochs done.

    Args:
        config: the run's configuration.
        run_dir: where it is stored (see `run.rundir`).
        resume: continue from the last checkpoint instead of starting a run.
        init_from: agent whose parameters a new run starts from (see `run.stored.open_agent`).
        make: called as ``make(config.env, training=True)`` for training and with ``training=False``
            for evaluation; must be picklable if there are several environments.
        console: where progress is shown.
        on_record: called with each record of ``metrics.jsonl`` and ``evaluations.jsonl``, as it is
            written (docs/metrics.md).
        data: recorded episodes, in place of those that ``config.collect.data`` names; they have the
            attributes of Minari's ``EpisodeData`` (see `data.recorded.to_episodes`).

    Returns: the final state. Its ``acting`` are the parameters to act with; `Agent.load` makes an
        agent of the run.

    Raises:
        UsageError: if the directory cannot be used, the configuration is invalid or not that of the
            resumed run, or the initial parameters do not fit it.
        cli.Interrupted: after a signal to stop, once a checkpoint is written.
        StoppedError: if losses or scores stay non-finite, or an environment is lost repeatedly.
    """
    from valdi_jax.run import loop

    return loop.train(
        config,
        Path(run_dir),
        make=make,
        resume=resume,
        init_from=None if init_from is None else Path(init_from),
        console=console,
        on_record=on_record,
        data=data,
    )


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Parse the command line; defaults come from the preset or the resumed run.

    Raises:
        UsageError: if an option is invalid.
    """
    chosen = _value_of("--preset", argv)
    resumed = _value_of("--resume", argv)
    if chosen is not None and resumed is not None:
        raise UsageError("--preset and --resume exclude each other: a run keeps its settings")
    given = _value_of("--init-from", argv)
    if given is not None and resumed is not None:
        raise UsageError("--init-from and --resume exclude each other: a run has its parameters")
    if resumed or given:
        from valdi_jax.run import rundir, stored
    if resumed:
        base = rundir.load_config(Path(resumed))
    elif given and chosen is None:
        base = stored.open_agent(Path(given)).config
    else:
        env = _environment(argv)
        if not env and given:
            env = {"name": stored.open_agent(Path(given)).config.env.name}
        base = default_config(env.get("name"), chosen).replace(env=env)
    arguments = cli.parse(
        Arguments,
        argv,
        default=Arguments(config=base),
        prog="python -m valdi_jax.train",
        description="Train a Valdi agent.",
    )
    if given and chosen is None and arguments.config.env.name != base.env.name:
        try:
            validate(arguments.config.replace(model={"action_dim": 1}))
        except UsageError as error:
            raise UsageError(
                f"{error} ({given} is of {base.env.name}, and its settings hold unless there is a "
                "--preset)"
            ) from error
    if resumed and arguments.run_dir:
        raise UsageError("--run-dir and --resume exclude each other: a run stays where it is")
    return arguments


def _environment(argv: Sequence[str]) -> dict[str, Any]:
    """Fields of ``config.env``: of ``--env``, or of the recorded data if they are its."""
    env, data = (_value_of(option, argv) for option in ("--env", "--data"))
    if data is None:
        return {} if env is None else {"name": env}
    from valdi_jax.data.recorded import environment_of

    theirs = environment_of(data, env)
    if not theirs and not any(_value_of(option, argv) for option in ("--init-from", "--preset")):
        raise UsageError(
            f"{data} does not say which environment it is of: give --env, or train(..., make=...) "
            "from a program"
        )
    return theirs


def _value_of(option: str, argv: Sequence[str]) -> str | None:
    """The last value of an option that decides the defaults of all others."""
    found = None
    for token, following in zip(argv, [*argv[1:], None], strict=True):
        if token.replace("_", "-") == option:
            found = following
        elif token.replace("_", "-").startswith(option + "="):
            found = token.split("=", 1)[1]
    return found


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    arguments = parse_arguments(argv)
    import_modules(arguments.imports)
    import jax

    from valdi_jax import compilation
    from valdi_jax.run import processes

    processes.start(arguments.config.learn)  # before any use of a device
    compilation.cache_compilations()
    # Unique also among the jobs of an array that start in the same second.
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)
    run_dir = (
        arguments.resume
        or arguments.run_dir
        or Path("runs") / f"{arguments.config.env.name.replace(':', '-').replace('/', '-')}-{stamp}"
    )
    with contextlib.ExitStack() as stack:
        on_record = None
        if "wandb" in arguments.log and not jax.process_index():
            from valdi_jax.run.wandb import WandB

            on_record = stack.enter_context(WandB(run_dir, arguments.config))
        try:
            train(
                arguments.config,
                run_dir,
                resume=arguments.resume is not None,
                init_from=arguments.init_from,
                on_record=on_record,
            )
        except cli.Interrupted:
            return 130
    return 0


def command() -> None:
    """Run the console script."""
    cli.run(main)


if __name__ == "__main__":
    command()
