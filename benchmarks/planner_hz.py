"""Plans per second, and the time of their matrix products alone.

python benchmarks/planner_hz.py --json planner.json
python benchmarks/planner_hz.py --batch 16 --precision bfloat16
python benchmarks/planner_hz.py --devices 2

With --batch, the times are those of a call that plans for all observations at once.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
from pathlib import Path

import jax
import measure
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from valdi_jax import PRESETS, init_params, plan
from valdi_jax.config import Config
from valdi_jax.observation import Observation
from valdi_jax.types import Array, Params

ROWS = ("diffusion/1", "diffusion/2", "diffusion/4", "diffusion/8", "mlp")  # model / DDIM steps


def plan_products(config: Config, batch: int) -> measure.Products:
    """Matrix products of a batch of plans: dynamics and heads, over all CEM iterations.

    All observations share the weights, so a batch only adds rows.
    """
    model, planner = config.model, config.planner
    steps = 1 if model.dynamics == "mlp" else planner.diffusion_steps
    candidates = batch * planner.candidates
    one = measure.scaled(measure.dynamics_products(model, candidates), steps)
    one += measure.heads_products(model, candidates * model.horizon, candidates)
    return measure.scaled(one, planner.iterations)


@functools.partial(jax.jit, static_argnames=("config",))
def plan_all(params: Params, observations: Observation, keys: Array, *, config: Config) -> Array:
    """Actions [B, H * C, A] for a batch of observations; a single one is not vmapped."""
    if keys.shape[0] == 1:
        one = jax.tree.map(lambda x: x[0], observations)
        return plan(params, one, keys[0], config=config).actions[None]
    return jax.vmap(lambda o, k: plan(params, o, k, config=config).actions)(observations, keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    presets = ["paper", "cpu", "tiny"]  # of CarRacing, whose observations these are
    parser.add_argument("--preset", choices=presets, default="paper", help="sizes to plan with")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW")
    parser.add_argument("--seconds", type=float, default=20.0, help="measured for each row")
    parser.add_argument("--batch", type=int, default=1, help="observations planned for at once")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--devices", type=int, default=1, help="that share the candidates; a CPU becomes as many"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()

    if arguments.devices > 1:
        jax.config.update("jax_num_cpu_devices", arguments.devices)
    if jax.device_count() < arguments.devices:
        parser.error(f"there are {jax.device_count()} devices, not {arguments.devices}")
    mesh = Mesh(np.array(jax.devices()[: arguments.devices]), ("devices",))
    rng = np.random.default_rng(0)
    keys = jax.random.split(jax.random.key(1), arguments.batch)
    rows = []
    base = PRESETS[arguments.preset].replace(planner={"precision": arguments.precision})
    for name in arguments.rows:
        dynamics, _, steps = name.partition("/")
        config = base.replace(
            model={"dynamics": dynamics}, planner={"diffusion_steps": int(steps or 1)}
        )
        # Each call takes observations from the host and puts the actions back there.
        observations = [
            measure.example_observation(rng, config, (arguments.batch,)) for _ in range(16)
        ]
        example = measure.example_observation(rng, config)
        params = init_params(jax.random.key(0), example, config=config)
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        number = itertools.count()

        def call(params=params, observations=observations, number=number, config=config):
            observation = observations[next(number) % len(observations)]
            with contextlib.nullcontext() if mesh.size == 1 else jax.set_mesh(mesh):
                return np.asarray(plan_all(params, observation, keys, config=config))

        products = plan_products(config, arguments.batch)
        row = measure.row(name, call, products, arguments.seconds, arguments.precision)
        rows.append(row | {"per_second": arguments.batch * row["per_second"]})
    measure.report(measure.machine_name(), rows, arguments.json)


if __name__ == "__main__":
    main()
