"""Episodes an hour of training, end to end, and the share of each stage.

Runs of `valdi_jax.train` in a directory that is deleted afterwards, of full episodes: no patience,
no evaluation. The seed episodes fill the replay and compile everything; the rest is measured.

python benchmarks/train_throughput.py --preset paper --json throughput.json
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import measure
from rich.console import Console

from valdi_jax import PRESETS
from valdi_jax.config import Config
from valdi_jax.progress import read_jsonl
from valdi_jax.train import train

PAPER_EPISODES = 5000
STAGES = ("plan", "env", "learn", "save")


def variants(base: Config, names: list[str]) -> Iterator[tuple[str, Config]]:
    """The configurations asked for, by the options that make them."""
    changes = {
        "strict": {},
        "chunk": {"env": {"render_every": "chunk"}},
        "overlap": {"collect": {"overlap": True}},
        "mlp": {"model": {"dynamics": "mlp"}},
        "device": {"replay": {"placement": "device"}},
    }
    for name in names:
        config = base
        for part in name.split("+"):
            config = config.replace(**changes[part])
        yield name, config


def measure_run(name: str, config: Config, rounds: int) -> dict:
    """Train for some rounds after those that warm up; the figures are of these."""
    warm_up = 2 * config.collect.num_envs  # the second round compiles the update
    config = config.replace(
        env={"patience": 0},
        collect={
            "episodes": warm_up + rounds * config.collect.num_envs,
            "seed_episodes": config.collect.num_envs,
        },
        eval={"every": 0},
        checkpoint={"every": max(1, warm_up + rounds * config.collect.num_envs)},
    )
    with tempfile.TemporaryDirectory() as directory:
        train(config, Path(directory) / "run", console=Console(quiet=True))
        records = read_jsonl(Path(directory) / "run" / "metrics.jsonl")
    before, after = records[warm_up - 1], records[-1]
    seconds = after["time/seconds"] - before["time/seconds"]
    measured = records[warm_up:]
    shares = {}
    for stage in STAGES:
        # The episodes of a round share its time; one that ends early waits for the longest.
        total = 0.0
        for first in range(0, len(measured), config.collect.num_envs):
            some = measured[first : first + config.collect.num_envs]
            total += max(record.get(f"time/{stage}_s", 0.0) for record in some)
        shares[stage] = total / seconds
    per_hour = 3600 * len(measured) / seconds
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "name": name,
        "per_hour": per_hour,
        "episodes": len(measured),
        "steps": sum(record["episode/length"] for record in measured),
        "updates": after["total/updates"] - before["total/updates"],
        "shares": shares,
        "host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "device_gb": stats.get("peak_bytes_in_use", 0) / 1e9,
        "paper_hours": PAPER_EPISODES / per_hour,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="sizes to train with")
    parser.add_argument("--tiny", action="store_true", help="the preset tiny and one short round")
    parser.add_argument("--rounds", type=int, default=2, help="measured for each row")
    parser.add_argument("--num-envs", type=int, default=1, help="environments in parallel")
    parser.add_argument(
        "--rows", nargs="+", default=["strict", "mlp"], metavar="ROW",
        help="strict, or any of chunk, overlap, mlp and device joined by +",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()

    base = PRESETS["tiny" if arguments.tiny else arguments.preset]
    base = base.replace(collect={"num_envs": arguments.num_envs})
    rounds = 1 if arguments.tiny else arguments.rounds
    rows = []
    for name, config in variants(base, arguments.rows):
        rows.append(measure_run(name, config, rounds))
        print(f"{name}: {rows[-1]['episodes']} episodes", flush=True)

    machine = measure.machine_name()
    print(f"\n{machine}, {arguments.num_envs} environments")
    stages = "".join(f"{stage:>8}" for stage in STAGES)
    print(f"{'name':<18}{'ep / hour':>10}{stages}{'host GB':>9}{'dev GB':>8}{'5000 ep':>10}")
    for row in rows:
        shares = "".join(f"{row['shares'][stage]:>8.0%}" for stage in STAGES)
        print(
            f"{row['name']:<18}{row['per_hour']:>10.1f}{shares}{row['host_gb']:>9.1f}"
            f"{row['device_gb']:>8.1f}{row['paper_hours']:>8.1f} h"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
