"""The commands and benchmarks as a user starts them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from valdi_jax.progress import read_jsonl

ROOT = Path(__file__).parent.parent


def start(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, **kwargs
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["valdi_jax.train", "--env", "carrcing"], "did you mean 'carracing'"),
        (["valdi_jax.train", "--model.dynamcs", "mlp"], "did you mean --model.dynamics"),
        (["valdi_jax.train", "--run-dir", "{file}/run"], "cannot write to"),
        (["valdi_jax.evaluate", "{file}"], "is not a run directory"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, arguments, message):
    (tmp_path / "file").write_text("")
    arguments = [a.format(file=tmp_path / "file") for a in arguments]
    done = start("-m", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("command", ["train", "evaluate", "checkpoint", "convert"])
def test_help_explains_the_options(command):
    done = start("-m", f"valdi_jax.{command}", "--help")
    assert done.returncode == 0
    assert "usage: python -m valdi_jax." + command in done.stdout


@pytest.mark.parametrize(
    ("script", "options", "names"),
    [
        (
            "planner_hz",
            ["--preset", "tiny"],
            ["diffusion/1", "diffusion/2", "diffusion/4", "diffusion/8", "mlp"],
        ),
        ("update_hz", ["--preset", "tiny"], ["diffusion", "diffusion/ema", "mlp", "mlp/ema"]),
        ("env_hz", [], ["gymnasium", "valdi", "valdi/chunk"]),
    ],
)
def test_benchmarks_run_and_write_their_rows(tmp_path, script, options, names):
    path = tmp_path / "rows.json"
    done = start(
        ROOT / "benchmarks" / f"{script}.py",
        *options, "--seconds", "0.1", "--json", path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = json.loads(path.read_text())
    assert set(data) == {"machine", "rows"}
    assert [row["name"] for row in data["rows"]] == names
    for row in data["rows"]:
        assert set(row) == {"name", "per_second", "median_ms", "p99_ms", "floor_ms"}
        assert 0 < row["median_ms"] <= row["p99_ms"]
        assert row["floor_ms"] > 0


def test_the_throughput_benchmark_accounts_for_its_time(tmp_path):
    path = tmp_path / "rows.json"
    rows = ["strict", "chunk+overlap+device"]
    done = start(
        ROOT / "benchmarks" / "train_throughput.py", "--tiny", "--rows", *rows, "--json", path
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(path.read_text())
    assert [row["name"] for row in data["rows"]] == rows
    for row in data["rows"]:
        assert row["steps"] == 60
        assert row["updates"] == 6
        assert row["per_hour"] > 0
        assert row["host_gb"] > 0
        assert all(0 < share <= 1 for share in row["shares"].values())
    assert 0.5 < sum(data["rows"][0]["shares"].values()) <= 1


def test_the_second_start_of_a_command_takes_its_programs_from_the_cache(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    del environment["JAX_COMPILATION_CACHE_DIR"]

    def train(name):
        done = start(
            *["-m", "valdi_jax.train", "--preset", "pendulum", "--env.max-steps", "40"],
            *["--collect.episodes", "6", "--eval.every", "0", "--run-dir", name],
            cwd=tmp_path,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        records = read_jsonl(tmp_path / name / "metrics.jsonl")
        losses = [(r["episode/return"], r.get("loss/total")) for r in records]
        return int(re.search(r"compiled for \d+ s in all; (\d+)", done.stdout)[1]), losses

    (first, losses), (second, again) = train("one"), train("two")
    assert first == 0
    assert second >= 3  # the parameters, the plan and the update at the least
    assert again == losses, "what was kept computes as what was compiled"
