"""Plans a second, beside the time that the matrix products alone take.

python benchmarks/planner_hz.py --json planner.json
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path

import jax
import measure
import numpy as np

from valdi_jax import PRESETS, init_params, plan
from valdi_jax.config import Config


def plan_products(config: Config) -> measure.Products:
    """Matrix products of one plan: the dynamics and the heads, over all CEM iterations."""
    model, planner = config.model, config.planner
    steps = 1 if model.dynamics == "mlp" else planner.diffusion_steps
    one = measure.scaled(measure.dynamics_products(model, planner.candidates), steps)
    one += measure.heads_products(model, planner.candidates * model.horizon, planner.candidates)
    return measure.scaled(one, planner.iterations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="sizes to plan with")
    parser.add_argument("--seconds", type=float, default=20.0, help="measured for each row")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()

    rng, key = np.random.default_rng(0), jax.random.key(1)
    rows = []
    base = PRESETS[arguments.preset]
    for name in ("diffusion/1", "diffusion/2", "diffusion/4", "diffusion/8", "mlp"):
        dynamics, _, steps = name.partition("/")
        config = dataclasses.replace(
            base,
            model=dataclasses.replace(base.model, dynamics=dynamics),
            planner=dataclasses.replace(base.planner, diffusion_steps=int(steps or 1)),
        )
        # Each call takes an observation from the host and puts the actions back there.
        observations = [measure.example_observation(rng) for _ in range(16)]
        params = init_params(jax.random.key(0), observations[0], config=config)
        number = itertools.count()

        def call(params=params, observations=observations, number=number, config=config):
            observation = observations[next(number) % len(observations)]
            return np.asarray(plan(params, observation, key, config=config).actions)

        rows.append(measure.row(name, call, plan_products(config), arguments.seconds))
    measure.report(measure.machine_name(), rows, arguments.json)


if __name__ == "__main__":
    main()
