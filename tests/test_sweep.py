"""Grids of runs: trained once, resumed, gathered."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from valdi_jax.errors import UsageError

ROOT = Path(__file__).parent.parent
SMALL = [
    *("--env.max-steps", "30", "--collect.episodes", "3", "--collect.seed-episodes", "2"),
    *("--planner.candidates", "8", "--planner.elites", "2", "--eval.episodes", "1"),
    *("--learn.updates-per-step", "0.05", "--learn.batch-size", "4", "--eval.every", "3"),
]


@pytest.fixture(scope="module")
def sweep():
    spec = importlib.util.spec_from_file_location("sweep", ROOT / "experiments/sweep.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep"] = module
    spec.loader.exec_module(module)
    return module


def fake_run(directory, returns):
    directory.mkdir(parents=True)
    records = [
        {"episode": 10 * i - 1, "total/env_steps": 5000 * i, "eval/return": value}
        for i, value in enumerate(returns, 1)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    for name in ("metrics", "evaluations"):
        (directory / f"{name}.jsonl").write_text(lines)
    config = {"collect": {"episodes": 10 * len(returns)}, "eval": {"every": 10}}
    (directory / "config.json").write_text(json.dumps(config))


def test_a_grid_trains_once_and_is_gathered(tmp_path):
    command = [sys.executable, "experiments/sweep.py", str(tmp_path), "--tasks", "pendulum"]
    command += ["--agents", "mlp", "--seeds", "0", "--", *SMALL]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    run = tmp_path / "pendulum-mlp-0"
    score = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])["eval/return"]
    assert f"| pendulum | {score:.0f} (1) | 90 |" in first.stdout
    changed = (run / "metrics.jsonl").stat().st_mtime_ns
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0
    assert (run / "metrics.jsonl").stat().st_mtime_ns == changed


def test_a_run_that_fails_is_named(tmp_path):
    command = [sys.executable, "experiments/sweep.py", str(tmp_path), "--tasks", "pendulim"]
    done = subprocess.run(
        [*command, "--agents", "mlp", "--seeds", "0"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 3
    assert "1 of 1 runs failed" in done.stderr
    assert "pendulim" in (tmp_path / "logs/pendulim-mlp-0.log").read_text()


def test_nothing_starts_if_an_option_of_any_run_is_invalid(sweep, tmp_path):
    arguments = ["--tasks", "pendulum", "--agents", "mlp", "q=--preset valdiq", "--seeds", "0"]
    grid = sweep.parse_grid(argparse.ArgumentParser(), [str(tmp_path / "runs"), *arguments])
    with pytest.raises(UsageError, match=r"pendulum-q-0: .*valdi-q"):
        sweep.run_grid(grid)
    assert not (tmp_path / "runs").exists()


def test_runs_are_ordered_by_seed_and_finished_ones_are_known(sweep, tmp_path):
    cells = sweep.make_grid(tmp_path, ["a:x", "b"], ["mlp", "wide=--model.value-width 9"], [3, 4])
    assert [cell.name for cell in cells][:5] == [
        *("a-x-mlp-3", "a-x-wide-3", "b-mlp-3", "b-wide-3", "a-x-mlp-4")
    ]
    assert cells[1].options == ("--model.value-width", "9")
    fake_run(cells[0].directory, [1.0, 2.0])
    assert cells[0].finished()
    assert not cells[1].finished()


def test_the_table_takes_the_last_evaluation_up_to_a_step(sweep, tmp_path):
    cells = sweep.make_grid(tmp_path, ["a", "b"], ["mlp"], [0, 1])
    for cell, last in zip(cells, (10, 20, 30, 40), strict=True):
        fake_run(cell.directory, [0.0, last, 1000.0])
    lines = sweep.table(cells, step=10_400).splitlines()
    assert lines[2:4] == ["| a | 20 ± 10 (2) | 10,000 |", "| b | 30 ± 10 (2) | 10,000 |"]
    assert lines[4].startswith("| interquartile mean of 2 tasks, 95% interval | 25 [")
    for step in (12_000, 20_000):  # long after an evaluation, and beyond the last
        assert sweep.table(cells, step=step).splitlines()[2] == "| a |  |  |"


def test_aggregates_are_of_the_tasks_that_all_agents_have_done(sweep, tmp_path):
    cells = sweep.make_grid(tmp_path, ["a", "b", "c"], ["mlp", "flow"], [0])
    for cell in cells:
        if cell.name != "c-mlp-0":
            fake_run(cell.directory, [10.0] if cell.task != "c" else [900.0, 900.0])
    assert sweep.common_tasks(cells) == ["a", "b"]
    lines = sweep.table(cells).splitlines()
    assert lines[4] == "| c |  | 900 (1) | 10,000 |"
    assert lines[5] == "| interquartile mean of 2 tasks, 95% interval | 10 | 10 |  |"  # one seed


def test_cores_that_are_not_there_are_refused(sweep, tmp_path, capsys):
    arguments = [str(tmp_path), "--tasks", "pendulum", "--cores", "9999"]
    with pytest.raises(SystemExit):
        sweep.parse_grid(argparse.ArgumentParser(), arguments)
    assert "there is no core 9999" in capsys.readouterr().err


def test_the_interval_resamples_within_tasks(sweep):
    constant = [np.full(3, 1.0), np.full(3, 5.0)]
    assert sweep.interval(constant, np.mean) == (3.0, 3.0, 3.0)
    value, low, high = sweep.interval([np.array([0.0, 10.0])], np.mean)
    assert (value, low, high) == (5.0, 0.0, 10.0)
