"""All searches at equal evaluations: on functions with known optima, or on trained agents.

python experiments/planners.py --evaluations 256
python experiments/planners.py --agents pendulum lunarlander carracing --episodes 20

An agent is a run, an exported or a packaged one. Without a policy prior or an energy, MBDPO and
MPPI search without them; guided needs a network prior.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax import Agent, cli
from valdi_jax.config import MBDPOConfig, PlannerConfig, validate
from valdi_jax.errors import UsageError
from valdi_jax.evaluate import summary
from valdi_jax.planners import PLANNERS
from valdi_jax.planners.base import Problem

SHAPE = (10, 2)
ITERATIONS = {"cem": 4, "icem": 4, "mppi": 4, "mbdpo": 7}
KINDS = (*ITERATIONS, "guided")


def settings(
    kind: str, evaluations: int, base: PlannerConfig, guide: dict, timesteps: int = 0
) -> PlannerConfig:
    """A planner that scores about so many sequences, or applies its prior to so many plans."""
    if kind == "guided":
        sampling = dataclasses.replace(base.diffuser, **guide)
        passes = sampling.warm_start or timesteps
        passes *= 1 + (sampling.guide_steps if sampling.scale else 0)
        candidates = max(evaluations // passes, 1)
        return dataclasses.replace(base, kind=kind, candidates=candidates, diffuser=sampling)
    iterations = ITERATIONS[kind]
    # iCEM's population decays from one iteration to the next.
    share = sum(base.icem.decay**-i for i in range(iterations)) if kind == "icem" else iterations
    candidates = max(int(evaluations / share), 8)
    return dataclasses.replace(
        base,
        kind=kind,
        answer="mean",
        candidates=candidates,
        elites=max(candidates // (4 if kind == "mbdpo" else 8), 2),
        iterations=iterations,
        policy_candidates=min(base.policy_candidates, candidates - 1),
        mbdpo=MBDPOConfig(steps=ITERATIONS["mbdpo"] + 1),
    )


def hill(x):
    """A smooth maximum of 0 at half throttle."""
    return -jnp.sum((x - 0.5) ** 2, axis=(1, 2))


def wave(x):
    """A maximum of 0 that varies along the sequence."""
    target = 0.8 * jnp.sin(jnp.linspace(0, 3, x.shape[1]))[None, :, None]
    return -jnp.sum((x - target) ** 2, axis=(1, 2))


def ripples(x):
    """Rastrigin's function: a local maximum every 0.4, the highest, 0, at 0.4."""
    y = (x - 0.4) / 0.4
    return -jnp.sum(y**2 + 0.5 * (1 - jnp.cos(2 * jnp.pi * y)), axis=(1, 2))


def corner(x):
    """The maximum, 0, is on the bounds."""
    return -jnp.sum(
        jnp.abs(x - jnp.where(jnp.arange(x.shape[1]) < 5, 1, -1)[None, :, None]), (1, 2)
    )


FUNCTIONS = {"hill": hill, "wave": wave, "ripples": ripples, "corner": corner}


def on_functions(kinds: list[str], evaluations: int, seeds: int = 50) -> list[dict]:
    """How far below the optimum each search ends, cold, over seeds."""
    results = []
    for name, function in FUNCTIONS.items():
        for kind in kinds:
            config = settings(kind, evaluations, PlannerConfig(), {})
            planner = PLANNERS[kind]
            problem = Problem(SHAPE, 1, lambda x, key, f=function: f(x))

            @jax.jit
            @jax.vmap
            def regret(key, planner=planner, problem=problem, config=config, f=function):
                start = planner.init(SHAPE, config=config)
                found, _ = planner.search(problem, start, key, config=config)
                return -f(planner.squash(found.sequence)[None])[0]

            values = np.asarray(regret(jax.random.split(jax.random.key(0), seeds)))
            error = values.std(ddof=1) / np.sqrt(seeds)
            results.append(
                {"task": name, "planner": kind, "mean": float(values.mean()), "error": float(error)}
            )
    return results


def on_agents(
    agents: list[str], kinds: list[str], evaluations: int, episodes: int, guide: dict
) -> list[dict]:
    """Return over fixed episodes without noise, and milliseconds a plan."""
    results = []
    for name in agents:
        for kind in kinds:
            agent = Agent.load(name)
            planner = settings(
                *(kind, evaluations, agent.config.planner, guide),
                timesteps=agent.config.model.prior.timesteps,
            )
            agent.config = dataclasses.replace(agent.config, planner=planner)
            validate(agent.config)
            start = time.monotonic()
            scored = agent.evaluate(episodes=episodes)
            numbers = summary([result.episode.episode_return for result in scored])
            plan_ms = float(1000 * np.median(np.concatenate([r.plan_seconds for r in scored])))
            results.append(
                {
                    "task": name,
                    "planner": kind,
                    "mean": numbers["mean"],
                    "error": numbers["standard_error"],
                    "plan_ms": plan_ms,
                    "seconds": time.monotonic() - start,
                }
            )
            print(json.dumps(results[-1]), flush=True)
    return results


def table(results: list[dict], kinds: list[str]) -> str:
    """Markdown: a row a task, a column a planner, milliseconds a plan in brackets."""
    lines = ["| task | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for task in dict.fromkeys(result["task"] for result in results):
        cells = []
        for kind in kinds:
            (r,) = [r for r in results if (r["task"], r["planner"]) == (task, kind)]
            digits = 2 if abs(r["mean"]) < 10 else 0
            cell = f"{r['mean']:.{digits}f}"
            if r["error"] is not None:  # of more than one episode
                cell += f" ± {r['error']:.{digits}f}"
            cells.append(cell + (f" ({r['plan_ms']:.0f})" if "plan_ms" in r else ""))
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--agents", nargs="+", metavar="AGENT")
    parser.add_argument("--planners", nargs="+", default=list(ITERATIONS), choices=KINDS)
    parser.add_argument("--scale", type=float, default=0.1, help="guided: of the gradient")
    parser.add_argument("--guide-steps", type=int, default=1, help="guided: along the gradient")
    parser.add_argument("--guide-stop", type=int, default=0, help="guided: last timesteps without")
    parser.add_argument("--through", action="store_true", help="guided: through the prior")
    parser.add_argument("--warm-start", type=int, default=0, help="guided: timesteps anew")
    parser.add_argument("--evaluations", type=int, default=256, help="sequences scored in a plan")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--json", type=Path, help="where to write the results")
    arguments = parser.parse_args(argv)
    kinds, evaluations = arguments.planners, arguments.evaluations
    for option, given in (("--planners", kinds), ("--agents", arguments.agents or [])):
        if len(set(given)) < len(given):
            raise UsageError(f"{option} names one twice: {' '.join(given)}")
    if "guided" in kinds and not arguments.agents:
        parser.error("guided samples from an agent's prior: give --agents")
    if arguments.agents:
        names = ("scale", "guide_steps", "guide_stop", "through", "warm_start")
        guide = {name: getattr(arguments, name) for name in names}
        results = on_agents(arguments.agents, kinds, evaluations, arguments.episodes, guide)
    else:
        results = on_functions(kinds, evaluations)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    print(table(results, kinds))


if __name__ == "__main__":
    cli.run(main)
