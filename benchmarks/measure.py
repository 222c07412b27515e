"""Shared by the benchmarks: timing, the floor, the table and the JSON file."""

from __future__ import annotations

import functools
import itertools
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from valdi_jax.config import Config, ModelConfig
from valdi_jax.observation import Observation

Products = Counter  # (rows, inner, columns) of a matrix product -> how often


def image_side(config: Config) -> int:
    """Pixels of each side of CarRacing's frames."""
    return 96 // config.env.downsample


def example_observation(
    rng: np.random.Generator, config: Config, lead: tuple[int, ...] = ()
) -> Observation:
    """A random CarRacing observation on the host."""
    side = image_side(config)
    return Observation(
        image=rng.integers(0, 256, (*lead, side, side, 3), np.uint8),
        vector=rng.standard_normal((*lead, 7)).astype(np.float32),
    )


def time_calls(call: Callable[[], object], seconds: float, least: int = 5) -> np.ndarray:
    """Wall seconds of each call, including its results, for about ``seconds``."""
    times = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return np.array(times)


def alternate(
    one: Callable[[], object], other: Callable[[], object], seconds: float, least: int = 5
) -> np.ndarray:
    """Wall seconds [calls, 2] of two alternating calls for about ``seconds``, once compiled."""
    for call in (one, other):
        jax.block_until_ready(call())
    pairs = []
    end = time.perf_counter() + seconds
    while len(pairs) < least or time.perf_counter() < end:
        pairs.append([time_calls(call, 0, least=1)[0] for call in (one, other)])
    return np.array(pairs)


def compile_seconds(call: Callable[[], object]) -> float:
    """Wall seconds of the first call."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


@functools.cache
def product_seconds(
    rows: int, inner: int, columns: int, seconds: float, dtype: str = "float32"
) -> float:
    """Median seconds of one product [rows, inner] x [inner, columns] on this machine.

    Products of this shape alternate with their transposes in one compiled loop, so that the figure
    includes no dispatch and no elementwise operations. It is measured for about ``seconds``.
    """
    there = jax.random.normal(jax.random.key(0), (inner, columns), dtype) * inner**-0.5
    back = jax.random.normal(jax.random.key(1), (columns, inner), dtype) * columns**-0.5
    x = jax.random.normal(jax.random.key(2), (rows, inner), dtype)
    # Enough products for at least a few milliseconds.
    pairs = max(1, min(2000, int(5e9 / (4 * rows * inner * columns))))

    @jax.jit
    def run(x):
        return jax.lax.scan(lambda x, _: ((x @ there) @ back, None), x, length=pairs)[0]

    run(x).block_until_ready()
    return float(np.median(time_calls(lambda: run(x), seconds)) / (2 * pairs))


def floor_seconds(products: Products, seconds: float = 0.3, dtype: str = "float32") -> float:
    """Seconds of the matrix products alone, each shape measured for ``seconds``."""
    return sum(n * product_seconds(*shape, seconds, dtype) for shape, n in products.items())


def mlp_products(rows: int, widths: list[int]) -> Products:
    """Matrix products of a chain of linear layers."""
    return Counter({(rows, a, b): n for (a, b), n in Counter(itertools.pairwise(widths)).items()})


def residual_products(rows: int, inputs: int, width: int, depth: int, outputs: int) -> Products:
    """Matrix products of a residual MLP."""
    products = Counter({(rows, inputs, width): 1, (rows, width, outputs): 1})
    products[rows, width, 2 * width] += depth
    products[rows, 2 * width, width] += depth
    return products


def dynamics_products(model: ModelConfig, batch: int) -> Products:
    """Matrix products of one network evaluation for a batch of H-step trajectories."""
    chunk = model.chunk * model.action_dim
    if model.dynamics == "mlp":
        one = residual_products(
            batch, model.latent_dim + chunk, model.mlp_width, model.mlp_depth, model.latent_dim
        )
        return scaled(one, model.horizon)
    width, hidden = model.transformer_width, model.transformer_hidden
    depth = model.transformer_depth
    tokens, answers = batch * (model.horizon + 1), batch * model.horizon
    products = Counter({(answers, width, model.latent_dim): 1})
    products[tokens, width, 3 * width] += depth
    # The last block drops the condition token.
    for rows, times in ((tokens, depth - 1), (answers, 1)):
        for shape in ((rows, width, width), (rows, width, hidden), (rows, hidden, width)):
            products[shape] += times
    return products


def heads_products(model: ModelConfig, reward_rows: int, value_rows: int) -> Products:
    """Matrix products of the reward head and the value heads."""
    inputs = model.latent_dim + model.chunk * model.action_dim
    products = residual_products(reward_rows, inputs, model.reward_width, model.reward_depth, 1)
    widths = [model.latent_dim, model.value_width, model.value_width, 1]
    for _ in range(model.value_heads):
        products += mlp_products(value_rows, widths)
    return products


def report(machine: str, rows: list[dict], path: Path | None) -> None:
    """Print the table, and write it to ``path`` if given."""
    print(f"\n{machine}")
    header = ("name", "per_second", "median_ms", "p99_ms", "floor_ms")
    print("{:<16}{:>12}{:>12}{:>12}{:>12}{:>12}".format(*header, "x floor"))
    for row in rows:
        ratio = row["median_ms"] / row["floor_ms"] if row["floor_ms"] else float("nan")
        numbers = [row[name] for name in header[1:]]
        print(f"{row['name']:<16}" + "".join(f"{n:>12.3f}" for n in numbers) + f"{ratio:>12.2f}")
    if path:
        path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


def row(
    name: str,
    call: Callable[[], object],
    products: Products,
    seconds: float,
    dtype: str = "float32",
) -> dict:
    """Measure one row of the report for about ``seconds``; compile time is printed separately."""
    compiling = compile_seconds(call)
    times = time_calls(call, seconds)
    print(f"{name}: {len(times)} calls, compiled in {compiling:.1f} s", flush=True)
    return {
        "name": name,
        "per_second": float(1 / times.mean()),
        "median_ms": float(1e3 * np.median(times)),
        "p99_ms": float(1e3 * np.percentile(times, 99)),
        "floor_ms": 1e3 * floor_seconds(products, min(seconds, 0.3), dtype),
    }


def machine_name() -> str:
    """The device that JAX computes on."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0].split(":")[1].strip() if names else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def scaled(products: Products, times: int) -> Products:
    """The same products, several times over."""
    return Counter({shape: times * count for shape, count in products.items()})
