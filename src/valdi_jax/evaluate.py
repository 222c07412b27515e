"""Evaluate a trained agent on fixed episodes: ``python -m valdi_jax.evaluate RUN``."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress as ProgressBar

from valdi_jax import cli, compilation
from valdi_jax.config import Config, PlannerConfig, validate
from valdi_jax.data.rollout import Rollout, roll_out
from valdi_jax.data.source import evaluation_jobs, sized
from valdi_jax.dynamics import DYNAMICS
from valdi_jax.envs import (
    evaluation_seeds,
    import_modules,
    interface_of,
    make_env,
    own_env,
)
from valdi_jax.envs.workers import make_pool
from valdi_jax.errors import UsageError
from valdi_jax.planners import PLANNERS
from valdi_jax.run import stored
from valdi_jax.run.manifest import check_writable, write_json
from valdi_jax.run.video import record_video, video_writer
from valdi_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line of the evaluation command."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run directory (its newest checkpoint), one of its checkpoints, an exported agent, or the name
    of a bundled agent, such as carracing."""
    episodes: int = 100
    """How many of the 100 fixed episodes (CarRacing: tracks) to run. Ctrl-C scores the first ones,
    up to one that is not done."""
    diffusion_steps: Annotated[tuple[int, ...], tyro.conf.arg(metavar="STEPS")] = ()
    """DDIM steps to evaluate with, one evaluation for each (e.g. 1 2 4 8); by default the run's."""
    num_envs: int = 1
    """Environments stepped in parallel."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write every episode's seed, return and length to this file."""
    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="env.import", metavar="MODULE")] = ()
    """Modules to import first, which register environments, world models, planners or terms."""
    video: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Record the first episode (.gif or .mp4)."""
    planner: PlannerConfig = dataclasses.field(default_factory=PlannerConfig)


def evaluate(
    params: Params,
    config: Config,
    *,
    episodes: int = 100,
    num_envs: int = 1,
    make: Callable[..., gym.Env] = make_env,
    on_decision: Callable[[], None] = lambda: None,
    on_rollout: Callable[[Rollout], None] = lambda rollout: None,
    first: int = 0,
    keep_observations: bool = False,
) -> list[Rollout]:
    """Roll out the first of the 100 fixed episodes without exploration noise.

    The planner's keys derive from the episode's seed, so the same parameters act the same way.
    CarRacing is scored over all frames, terminal or not, as in the paper.

    Args:
        params: parameters of all networks.
        config: the run's configuration.
        episodes: how many, 1 .. 100.
        num_envs: environments stepped in parallel.
        make: called as ``make(config.env, training=False)`` for an environment.
        on_decision: called before every planner call; an exception ends the evaluation.
        on_rollout: called with every finished rollout.
        first: number of the episode to begin with.
        keep_observations: whether episodes hold what the planner saw, and the last observation.

    Returns: one rollout per episode, in order; by default with only its last observation.

    Raises:
        UsageError: if there are no such episodes, or no environments.
    """
    evaluation_seeds(episodes)  # raises before anything is made
    if first >= episodes:
        return []
    factory = functools.partial(own_env, make, config.env, training=False)
    interface = interface_of(factory)
    config = sized(config, interface)
    pool = make_pool(
        factory,
        num_envs,
        example=interface.example,
        chunk=config.model.chunk,
        last_only=True,  # the planner sees no others
        timeout=config.collect.worker_timeout,
    )
    try:
        return roll_out(
            params,
            pool,
            evaluation_jobs(episodes)[first:],
            config=config,
            keep_observations=keep_observations,
            on_decision=on_decision,
            on_rollout=on_rollout,
        )
    finally:
        pool.close()


def summary(returns: Sequence[float]) -> dict[str, float | None]:
    """Mean, its standard error (none for a single return), median and interquartile mean."""
    ordered = np.sort(np.asarray(returns, np.float64))
    count = len(ordered)
    quarter = count // 4
    error = float(ordered.std(ddof=1) / math.sqrt(count)) if count > 1 else None
    return {
        "mean": float(ordered.mean()),
        "standard_error": error,
        "median": float(np.median(ordered)),
        "interquartile_mean": float(ordered[quarter : count - quarter].mean()),
    }


def parse_arguments(argv: Sequence[str]) -> tuple[Arguments, stored.StoredAgent]:
    """Parse the command line; the agent's configuration gets the planner options.

    Raises:
        UsageError: if an option is invalid, or RUN is not an agent.
    """
    parse = functools.partial(
        cli.parse,
        Arguments,
        argv,
        prog="python -m valdi_jax.evaluate",
        description="Evaluate a trained agent on fixed episodes.",
    )
    # The first pass finds the run, whose planner gives the defaults of the second.
    agent = stored.open_agent(parse(default=Arguments(run=tyro.MISSING)).run)
    config = agent.config
    arguments = parse(default=Arguments(run=tyro.MISSING, planner=config.planner))
    import_modules(arguments.imports)  # they may register the planner and the world model
    config = dataclasses.replace(config, planner=arguments.planner)
    if arguments.diffusion_steps and config.diffuses_plans:
        raise UsageError("--diffusion-steps: Diffuser takes all of --model.unet.timesteps")
    if arguments.diffusion_steps and DYNAMICS[config.model.dynamics].step is not None:
        raise UsageError(f"--diffusion-steps: {config.model.dynamics} dynamics have no diffusion")
    PLANNERS[config.planner.kind]
    if arguments.num_envs < 1:
        raise UsageError(f"--num-envs is {arguments.num_envs}; it must be above 0")
    evaluation_seeds(arguments.episodes)
    return arguments, dataclasses.replace(agent, config=config)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    arguments, agent = parse_arguments(argv)
    config = agent.config
    compilation.cache_compilations()
    configs = [
        dataclasses.replace(
            config, planner=dataclasses.replace(config.planner, diffusion_steps=steps)
        )
        for steps in arguments.diffusion_steps or (config.planner.diffusion_steps,)
    ]
    for each in configs:
        validate(each)
    if arguments.json:
        check_writable(arguments.json)
    if agent.made_by:
        raise UsageError(
            f"{arguments.run} was trained on environments that {agent.made_by} makes: evaluate it "
            "from a program, with evaluate(..., make=...)"
        )
    interface = interface_of(functools.partial(make_env, config.env, training=False))
    if interface.action_dim != config.model.action_dim:
        raise UsageError(
            f"{arguments.run} was trained with actions of size {config.model.action_dim}, but "
            f"those of {config.env.name} have size {interface.action_dim}"
        )
    params = agent.load(interface.example)

    filmed = []
    if arguments.video:
        video_writer(arguments.video)  # raises before anything else is done
        try:
            with cli.interruptible() as stop:
                filmed = [record_video(params, configs[0], arguments.video, on_decision=stop)]
            score = filmed[0].episode.episode_return
            print(f"{arguments.video}: a rollout with return {score:.1f}")
        except cli.Interrupted:
            return 130
        except UsageError as reason:
            print(f"warning: no video: {reason}", file=sys.stderr)

    results = []
    print(f"{agent.name}, {arguments.episodes} episodes")
    print(f"{'steps':>6}{'mean':>9}{'+- SE':>8}{'median':>9}{'IQM':>9}{'plan ms':>9}")
    for each in configs:
        steps = each.planner.diffusion_steps
        rollouts = list(filmed) if each is configs[0] else []
        interrupted = _score(arguments, params, each, rollouts)
        if not rollouts:
            return 130
        numbers = summary([result.episode.episode_return for result in rollouts])
        error = numbers["standard_error"]
        noise = "" if error is None else f"{error:.1f}"
        plan_ms = 1e3 * float(np.median(np.concatenate([r.plan_seconds for r in rollouts])))
        print(
            f"{steps:>6}{numbers['mean']:>9.1f}{noise:>8}"
            f"{numbers['median']:>9.1f}{numbers['interquartile_mean']:>9.1f}{plan_ms:>9.1f}",
            flush=True,
        )
        results.append(
            {
                "diffusion_steps": steps,
                **numbers,
                "plan_ms": plan_ms,
                "episodes": [
                    {
                        "seed": result.episode.seed,
                        "return": result.episode.episode_return,
                        "length": len(result.episode),
                        "terminated": result.episode.terminated,
                    }
                    for result in rollouts
                ],
            }
        )
        if arguments.json:
            write_json(arguments.json, {"checkpoint": agent.name, "results": results})
        if interrupted:
            print(
                f"stopped after {len(rollouts)} of {arguments.episodes} episodes", file=sys.stderr
            )
            return 130
    return 0


def _score(arguments: Arguments, params: Params, config: Config, rollouts: list[Rollout]) -> bool:
    """Add those that are missing to the rollouts; returns whether a signal ended it before."""
    longest = -(-config.episode_steps // config.model.chunk)  # 0 if not known
    total = arguments.episodes * longest / arguments.num_envs or None
    with (
        cli.interruptible() as check,
        ProgressBar(console=Console(stderr=True), transient=True) as bar,
    ):
        task = bar.add_task("evaluating", total=total)

        def on_decision() -> None:
            check()
            bar.advance(task)

        def on_rollout(rollout: Rollout) -> None:
            rollouts.append(rollout)
            mean = np.mean([each.episode.episode_return for each in rollouts])
            bar.update(task, description=f"mean {mean:.1f} of {len(rollouts)}")

        first = len(rollouts)
        try:
            rollouts[first:] = evaluate(  # in order
                params,
                config,
                episodes=arguments.episodes,
                num_envs=arguments.num_envs,
                on_decision=on_decision,
                on_rollout=on_rollout,
                first=first,
            )
            check()  # a signal since the last decision
        except cli.Interrupted:
            # Of several environments the short episodes end first, whose mean is another.
            driven = {rollout.episode.seed: rollout for rollout in rollouts}
            seeds = evaluation_seeds(arguments.episodes)
            rollouts[:] = [driven[seed] for seed in itertools.takewhile(driven.__contains__, seeds)]
            if late := len(driven) - len(rollouts):
                print(
                    f"episode {len(rollouts) + 1} was still driven: {late} after it do not count",
                    file=sys.stderr,
                )
            return True
    return False


def command() -> None:
    """Run the console script."""
    cli.run(main)


if __name__ == "__main__":
    command()
