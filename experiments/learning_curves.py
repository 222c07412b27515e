"""Training returns of several runs side by side (the paper's Figure 4, left).

python experiments/learning_curves.py diffusion=runs/a mlp=runs/b --out curves.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from valdi_jax.progress import read_jsonl


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last ``window`` values at each place, of fewer at the start."""
    sums = np.cumsum(values)
    sums[window:] -= sums[:-window].copy()
    return sums / np.minimum(np.arange(1, len(values) + 1), window)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN", help="run directories to compare")
    parser.add_argument("--window", type=int, default=20, help="episodes of the moving average")
    parser.add_argument("--out", type=Path, default=Path("learning_curves.png"))
    arguments = parser.parse_args()

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for argument in arguments.runs:
        label, _, directory = argument.partition("=")
        records = read_jsonl(Path(directory) / "metrics.jsonl")
        returns = np.array([record["episode/return"] for record in records])
        smooth = moving_average(returns, arguments.window)
        axes = {
            "episodes": 1 + np.arange(len(returns)),
            "hours": np.array([record["time/seconds"] for record in records]) / 3600,
        }
        for panel, (name, x) in zip(panels, axes.items(), strict=True):
            (line,) = panel.plot(x, smooth, label=label)
            panel.plot(x, returns, ".", color=line.get_color(), alpha=0.25, markersize=4)
            panel.set_xlabel(name)
    panels[0].set_ylabel(f"training return, mean of {arguments.window}")
    for panel in panels:
        panel.axhline(-30, color="gray", linewidth=0.8, linestyle=":")
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(arguments.out, dpi=130)
    print(arguments.out)


if __name__ == "__main__":
    main()
