"""Episodes an hour of collectors: this process, and Ray actors on this machine (extra ray).

python benchmarks/collect_hz.py carracing --actors 0 1 2 3 --episodes 4

Each line is one collector, its programs compiled before; 0 actors are the process itself. Each
actor gets the same first of the fixed evaluation tracks, with the ends of training episodes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from valdi_jax import cli
from valdi_jax.compilation import cache_compilations
from valdi_jax.data.collector import Collector
from valdi_jax.data.rollout import Job
from valdi_jax.data.source import Environments, evaluation_jobs
from valdi_jax.envs import make_env
from valdi_jax.run.stored import open_agent


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("agent", help="a run, an exported agent or a bundled one")
    parser.add_argument("--actors", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--episodes", type=int, default=4, help="of each actor")
    arguments = parser.parse_args(argv)
    cache_compilations()
    agent = open_agent(Path(arguments.agent))
    for actors in arguments.actors:
        collect = {"cluster": "local" if actors else "", "actors": max(1, actors), "num_envs": 1}
        source = Environments(agent.config.replace(collect=collect), make_env)
        params = agent.load(source.example)
        collector = source.open()
        try:
            run(collector, params, evaluation_jobs(1) * max(1, actors))  # compiles
            jobs = evaluation_jobs(arguments.episodes) * max(1, actors)
            count = len(jobs)
            seconds, steps = run(collector, params, jobs)
        finally:
            collector.close()
            source.close()
        where = f"{actors} Ray actors" if actors else "this process"
        print(
            f"{where:14} {count:3d} episodes, {steps} steps in {seconds:6.1f} s: "
            f"{3600 * count / seconds:6.0f} episodes an hour, {steps / seconds:6.0f} steps a second"
        )


def run(collector: Collector, params, jobs: Sequence[Job]) -> tuple[float, int]:
    """Seconds and environment steps of episodes."""
    start = time.perf_counter()
    ticket = collector.submit(params, 0, jobs, 0.0)
    rollouts = collector.result(ticket, lambda: None)
    seconds = time.perf_counter() - start
    return seconds, sum(len(rollout.episode) for rollout in rollouts)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    cli.run(main)
