"""Episodes per hour of training, end to end, and the share of each stage.

Runs `valdi_jax.train` in a temporary directory, without patience or evaluation. The first rounds
fill the replay buffer and compile everything; the rest are measured. Episodes may be shortened
(--steps); the reported rates are for full ones, with the preset's number of steps. If collecting
and learning overlap, so do their shares.

python benchmarks/train_throughput.py --preset paper --json throughput.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import measure
import numpy as np
from rich.console import Console

from valdi_jax import PRESETS
from valdi_jax.config import Config
from valdi_jax.run.log import read_jsonl
from valdi_jax.train import train

PAPER_EPISODES = 5000
STAGES = ("plan", "env", "learn", "save")


def variants(base: Config, names: list[str]) -> Iterator[tuple[str, Config]]:
    """The requested configurations, by the options that make them."""
    changes = {
        "strict": {},
        "chunk": {"env": {"render_every": "chunk"}},
        "overlap": {"collect": {"lag": 1}},
        "mlp": {"model": {"dynamics": "mlp"}},
        "ema": {"learn": {"td_encoder": "ema"}},
        "device": {"replay": {"placement": "device"}},
    }
    for name in names:
        config = base
        for part in name.split("+"):
            config = config.replace(**changes[part])
        yield name, config


def measure_run(name: str, config: Config, rounds: int, steps: int) -> dict:
    """Train for some rounds after the warm-up; the figures are of these."""
    full = config.env.max_steps
    # The update compiles in the second round, or in the third if it overlaps with collecting.
    warm_up = (3 if config.collect.lag else 2) * config.collect.num_envs
    config = config.replace(
        env={"patience": 0, "max_steps": min(steps, full)},
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
    # The environments of a group share its time; one that ends early waits for the longest.
    rounds_of = [
        measured[first : first + config.collect.num_envs]
        for first in range(0, len(measured), config.collect.num_envs)
    ]
    shares = {}
    for stage in STAGES:
        groups = 2 if config.collect.lag and stage in ("plan", "env") else 1
        shares[stage] = (
            sum(
                max(record.get(f"time/{stage}_s", 0.0) for record in part)
                for some in rounds_of
                for part in np.array_split(some, min(groups, len(some)))
            )
            / seconds
        )
    driven = sum(record["episode/length"] for record in measured)
    per_hour = 3600 * driven / full / seconds
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "name": name,
        "per_hour": per_hour,
        "steps": driven,
        "updates": after["total/updates"] - before["total/updates"],
        "shares": shares,
        "host_gb": max(record["memory/host_gb"] for record in measured),
        "device_gb": stats.get("peak_bytes_in_use", 0) / 1e9,  # over all rows so far
        "paper_hours": PAPER_EPISODES / per_hour,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=["paper", "cpu", "tiny"], default="paper")
    parser.add_argument("--tiny", action="store_true", help="the preset tiny and one short round")
    parser.add_argument("--rounds", type=int, default=2, help="measured for each row")
    parser.add_argument("--steps", type=int, default=150, help="of an episode, at most")
    parser.add_argument("--num-envs", type=int, default=1, help="environments in parallel")
    parser.add_argument(
        "--rows", nargs="+", default=["strict", "mlp"], metavar="ROW",
        help="strict, or any of chunk, overlap, mlp, ema and device joined by +",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()

    base = PRESETS["tiny" if arguments.tiny else arguments.preset]
    base = base.replace(collect={"num_envs": arguments.num_envs})
    rounds = 1 if arguments.tiny else arguments.rounds
    rows = []
    for name, config in variants(base, arguments.rows):
        rows.append(measure_run(name, config, rounds, arguments.steps))
        print(f"{name}: {rows[-1]['steps']} steps", flush=True)

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
