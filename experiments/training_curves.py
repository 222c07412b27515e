"""Training returns of runs by episode, step and hour (the paper's Figure 4), or another metric.

python experiments/training_curves.py diffusion=runs/a,runs/b,runs/c mlp=runs/d --out curves.png

Runs joined by commas differ in their seeds; their mean is drawn, with its 95% bootstrap interval
over runs. A curve ends with its shortest run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evidence
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter

from valdi_jax import cli
from valdi_jax.errors import UsageError
from valdi_jax.run.log import read_jsonl

AXES = ("episodes", "environment steps", "hours")


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last ``window`` values at each position, of fewer at the start."""
    sums = np.cumsum(values)
    sums[window:] -= sums[:-window].copy()
    return sums / np.minimum(np.arange(1, len(values) + 1), window)


def read_run(directory: Path, metric: str, window: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The x axes of a run's episodes, and their smoothed metric."""
    records = [r for r in read_jsonl(directory / "metrics.jsonl") if r.get(metric) is not None]
    if not records:
        raise UsageError(f"{directory} holds no episodes with {metric}")
    hold = json.loads((directory / "config.json").read_text())["env"]["action_repeat"]
    axes = {
        "episodes": np.array([record["episode"] + 1 for record in records]),
        "environment steps": hold * np.array([record["total/env_steps"] for record in records]),
        "hours": np.array([record["time/seconds"] for record in records]) / 3600,
    }
    values = np.array([record[metric] for record in records])
    return axes, moving_average(values, window)


def interval(curves: np.ndarray, samples: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95% bootstrap interval of the mean of curves [runs, points], over runs."""
    random = np.random.default_rng(0)
    drawn = random.integers(len(curves), size=(samples, len(curves)))
    low, high = np.quantile(curves[drawn].mean(axis=1), [0.025, 0.975], axis=0)
    return low, high


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN,...", help="runs to compare")
    parser.add_argument("--metric", default="episode/return", help="of metrics.jsonl")
    parser.add_argument("--window", type=int, default=20, help="episodes of the moving average")
    parser.add_argument("--level", type=float, help="value to draw a line at")
    parser.add_argument("--out", type=Path, default=Path("training_curves.png"))
    parser.add_argument("--json", type=Path, help="where to write the lengths and ends of the runs")
    arguments = parser.parse_args(argv)

    figure, panels = plt.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    rows: list[dict[str, Any]] = []
    for argument in arguments.runs:
        label, _, directories = argument.partition("=")
        if not directories:
            raise UsageError(f"{argument} is not LABEL=RUN,...")
        runs = [
            read_run(Path(name), arguments.metric, arguments.window)
            for name in directories.split(",")
        ]
        for directory, (axes, values) in zip(directories.split(","), runs, strict=True):
            ends = {name: float(axes[name][-1]) for name in AXES}
            last = {
                "metric": arguments.metric,
                "window": arguments.window,
                "last": float(values[-1]),
            }
            rows.append({"label": label, "run": directory} | ends | last)
        for panel, name in zip(panels, AXES, strict=True):
            # A common axis, up to the end of the shortest run.
            start = max(axes[name][0] for axes, _ in runs)
            x = np.linspace(start, min(axes[name][-1] for axes, _ in runs), 200)
            curves = np.stack([np.interp(x, axes[name], values) for axes, values in runs])
            (line,) = panel.plot(x, curves.mean(axis=0), label=label)
            if len(runs) > 1:
                low, high = interval(curves)
                panel.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
            panel.set_xlabel(name)
            if name != "hours":
                panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 500k
    named = {"episode/return": "training return", "memory/host_gb": "resident memory, GB"}
    label = named.get(arguments.metric, arguments.metric)
    panels[0].set_ylabel(label + (f", mean of {arguments.window}" if arguments.window > 1 else ""))
    for panel in panels:
        if arguments.level is not None:
            panel.axhline(arguments.level, color="gray", linewidth=0.8, linestyle=":")
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(arguments.out, dpi=130)
    if arguments.json:
        evidence.write(arguments.json, rows, [__file__, *argv])
    print(arguments.out)


if __name__ == "__main__":
    cli.run(main)
