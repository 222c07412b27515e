"""Copy what a run's curves need into a directory small enough to commit.

python experiments/keep_run.py RUN experiments/curves/NAME

training_curves.py takes the result in place of the run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from valdi_jax import cli
from valdi_jax.errors import UsageError
from valdi_jax.run.log import read_jsonl

METRICS = (
    "episode",
    "episode/return",
    "episode/length",
    "total/env_steps",
    "total/updates",
    "time/seconds",
    "value/mean",
)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args(argv)

    if not (arguments.run / "config.json").is_file():
        raise UsageError(f"{arguments.run} is not a run directory: it has no config.json")
    arguments.directory.mkdir(parents=True, exist_ok=True)
    kept = {
        "metrics.jsonl": METRICS,
        "evaluations.jsonl": ("episode", "total/env_steps", "eval/return", "returns"),
    }
    for name, keys in kept.items():
        lines = [
            json.dumps({key: _rounded(record[key]) for key in keys if key in record})
            for record in read_jsonl(arguments.run / name)
        ]
        (arguments.directory / name).write_text("".join(line + "\n" for line in lines))
    config = (arguments.run / "config.json").read_text()
    (arguments.directory / "config.json").write_text(config)


def _rounded(value):
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 2) if isinstance(value, float) else value


if __name__ == "__main__":
    cli.run(main)
