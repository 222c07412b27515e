"""Updates per second, and the time of their matrix products alone.

python benchmarks/update_hz.py --json update.json
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import jax
import measure
import numpy as np

from valdi_jax import PRESETS, Batch, init_state, update
from valdi_jax.config import Config
from valdi_jax.networks.encoder import convolutions, layer_channels

ROWS = ("diffusion", "diffusion/ema", "mlp", "mlp/ema")  # ema: the encoder of the TD target


def encoder_products(config: Config, images: int) -> measure.Products:
    """Matrix products of encoding images; a convolution counts as patches times kernel."""
    model = config.model
    products = Counter()
    size, channels = measure.image_side(config), 3
    shapes = convolutions(size, size)
    widths = layer_channels(model, len(shapes))
    for width, ((kernel, _), stride, padding) in zip(widths, shapes, strict=True):
        size = (size + 2 * padding - kernel) // stride + 1
        products[images * size**2, kernel**2 * channels, width] += 1
        channels = width
    products += measure.mlp_products(images, [channels, model.encoder_width])
    products += measure.mlp_products(images, [7, model.encoder_width, model.encoder_width])
    joint = 2 * model.encoder_width
    return products + measure.mlp_products(images, [joint, joint, model.latent_dim])


def update_products(config: Config) -> measure.Products:
    """Matrix products of one update: a pass with gradient costs three times one without."""
    model, batch = config.model, config.learn.batch_size
    horizon = model.horizon
    with_gradient = encoder_products(config, batch) + measure.dynamics_products(model, batch)
    trajectory = batch * (horizon + 1)
    with_gradient += measure.heads_products(model, trajectory, trajectory)
    frames = horizon + 1 if config.learn.td_encoder == "ema" else 2 * horizon + 1
    targets = encoder_products(config, frames * batch)
    widths = [model.latent_dim, model.value_width, model.value_width, 1]
    targets += measure.scaled(measure.mlp_products(trajectory, widths), model.value_heads)
    return measure.scaled(with_gradient, 3) + targets


def random_batch(rng: np.random.Generator, config: Config) -> Batch:
    """A batch of noise on the host."""
    model = config.model
    lead = (config.learn.batch_size, model.horizon + 1)
    return Batch(
        observations=measure.example_observation(rng, config, (lead[0], model.horizon + 2)),
        actions=rng.uniform(-1, 1, (*lead, model.chunk * model.action_dim)).astype(np.float32),
        rewards=rng.standard_normal((*lead, model.chunk)).astype(np.float32),
        terminals=np.zeros(lead, np.float32),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    presets = ["paper", "cpu", "tiny"]  # of CarRacing, whose observations these are
    parser.add_argument("--preset", choices=presets, default="paper", help="sizes to update with")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW")
    parser.add_argument("--seconds", type=float, default=20.0, help="measured for each row")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()

    rng = np.random.default_rng(0)
    rows = []
    base = PRESETS[arguments.preset]
    for name in arguments.rows:
        dynamics, _, encoder = name.partition("/")
        config = base.replace(
            model={"dynamics": dynamics}, learn={"td_encoder": encoder or "online"}
        )
        batch = random_batch(rng, config)
        example = measure.example_observation(rng, config)
        holder = [init_state(jax.random.key(0), example, config=config)]

        def call(holder=holder, batch=batch, config=config):
            holder[0], metrics = update(holder[0], batch, config=config)
            return metrics

        rows.append(measure.row(name, call, update_products(config), arguments.seconds))
    measure.report(measure.machine_name(), rows, arguments.json)


if __name__ == "__main__":
    main()
