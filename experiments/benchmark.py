"""The DeepMind Control tasks, beside the published curves of TD-MPC2 and DreamerV3.

python experiments/benchmark.py runs/benchmark [--tasks dmc:cup-catch ...] [--cores 0 1]

A grid as in sweep.py, with its options: interrupt it, and the same command goes on. It prints a
table at --step decisions and draws the curves. Published numbers and their source: published.csv.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sweep import Cell, aggregate, common_tasks, parse_grid, run_grid, table

from valdi_jax import cli

TASKS = [
    f"dmc:{name}"
    for name in (
        "cartpole-balance",
        "cartpole-swingup",
        "cup-catch",
        "pendulum-swingup",
        "finger-spin",
        "walker-stand",
        "reacher-hard",
        "walker-walk",
        "cheetah-run",
    )
]

Curves = dict[str, dict[str, dict[int, np.ndarray]]]


def published() -> Curves:
    """Returns of the seeds by method, task and step."""
    curves: Curves = defaultdict(lambda: defaultdict(dict))
    with Path(__file__).with_name("published.csv").open() as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            returns = np.array(row["returns"].split(), dtype=float)
            curves[row["method"]][row["task"]][int(row["step"])] = returns
    return curves


def beside(others: Curves, tasks: list[str], step: int) -> str:
    """Markdown: the published returns of the tasks at a step."""
    methods = list(others)
    lines = ["| task | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    known = [task for task in tasks if all(step in others[m][task] for m in methods)]
    lines += [
        f"| {task} | " + " | ".join(f"{others[m][task][step].mean():.0f}" for m in methods) + " |"
        for task in known
    ]
    if known:
        row = [aggregate([others[m][task][step] for task in known]) for m in methods]
        title = f"interquartile mean of {len(known)} tasks, 95% interval"
        lines.append(f"| {title} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def draw(cells: list[Cell], others: Curves, step: int, out: Path) -> None:
    """One panel a task: mean and range of the seeds, and the published means."""
    tasks = list(dict.fromkeys(cell.task for cell in cells if len(cell.curve()[0])))
    agents = list(dict.fromkeys(cell.agent for cell in cells))
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 2.6 * rows), squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(tasks) :]:
        panel.set_axis_off()
    for panel, task in zip(panels.flat, tasks, strict=False):
        for index, agent in enumerate(agents):
            curves = [c.curve() for c in cells if (c.task, c.agent) == (task, agent)]
            curves = [curve for curve in curves if len(curve[0])]
            if not curves:
                continue
            shown = np.linspace(
                max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves), 100
            )
            values = np.stack([np.interp(shown, *curve) for curve in curves])
            label = f"{agent}, {len(curves)} seeds" if len(curves) > 1 else agent
            panel.plot(
                shown / 1000,
                values.mean(axis=0),
                color=f"C{index}",
                label=label,
                marker=".",
                markevery=[-1],
            )
            panel.fill_between(
                shown / 1000,
                values.min(axis=0),
                values.max(axis=0),
                color=f"C{index}",
                alpha=0.2,
                lw=0,
            )
        for method, style in zip(others, ("k--", "k:"), strict=False):
            points = sorted((s, r.mean()) for s, r in others[method][task].items() if s <= step)
            if points:
                x, y = np.array(points).T
                panel.plot(x / 1000, y, style, lw=1, marker="o", ms=3, label=method)
        panel.set_title(task.removeprefix("dmc:"), fontsize=10)
        panel.set_ylim(0, 1000)
        panel.grid(alpha=0.3)
    figure.supxlabel("thousand decisions", fontsize=10)
    figure.supylabel("return", fontsize=10)
    handles = {
        label: handle
        for panel in panels.flat
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=4, frameon=False
    )
    figure.savefig(out, dpi=110)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step", type=int, default=100_000, help="decisions to compare at")
    parser.add_argument("--out", type=Path, default=Path("benchmark.png"))
    arguments = parse_grid(parser, argv, tasks=TASKS)
    cells = run_grid(arguments)
    others = published()
    tasks = common_tasks(cells, arguments.step) or arguments.tasks
    print(table(cells, arguments.step), beside(others, tasks, arguments.step), sep="\n\n")
    if any(len(cell.curve()[0]) for cell in cells):
        draw(cells, others, arguments.step, arguments.out)
        print(arguments.out)


if __name__ == "__main__":
    cli.run(main)
