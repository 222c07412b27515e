"""The commands and benchmarks, started as a user does."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from valdi_jax import compilation

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
        ("planner_hz", ["--preset", "tiny", "--rows"], ["diffusion/2"]),
        ("update_hz", ["--preset", "tiny", "--rows"], ["mlp/ema"]),
        ("env_hz", [], ["gymnasium", "valdi", "valdi/chunk"]),
    ],
)
def test_benchmarks_run_and_write_their_rows(tmp_path, script, options, names):
    path = tmp_path / "rows.json"
    done = start(
        ROOT / "benchmarks" / f"{script}.py",
        *options, *(names if "--rows" in options else []), "--seconds", "0.1", "--json", path,
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
    done = start(
        ROOT / "benchmarks" / "train_throughput.py", "--tiny", "--rows", "chunk", "--json", path
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(path.read_text())["rows"]
    assert row["name"] == "chunk"
    assert row["steps"] == 60
    assert row["updates"] == 6
    assert row["per_hour"] > 0
    assert row["host_gb"] > 0
    assert all(0 < share <= 1 for share in row["shares"].values())
    assert 0.5 < sum(row["shares"].values()) <= 1


def test_the_pytorch_benchmark_times_the_same_networks():
    pytest.importorskip("torch", reason="needs the extra 'torch'")
    script = ROOT / "benchmarks" / "pytorch_hz.py"
    done = start(script, "--preset", "tiny", "--seconds", "0.1")
    assert done.returncode == 0, done.stderr  # it counts the parameters
    assert [line.split()[0] for line in done.stdout.splitlines()[-2:]] == ["plan", "update"]


@pytest.mark.parametrize("rejected", [False, True])
def test_compiled_programs_are_kept_where_they_work(monkeypatch, tmp_path, rejected):
    kept = {}
    monkeypatch.setattr(jax.config, "update", kept.__setitem__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    if rejected:
        answers = iter([("8.0 False", ""), ("8.0 True", "Target machine feature is missing\n")])
        monkeypatch.setattr(
            subprocess,
            "run",
            lambda command, **_: subprocess.CompletedProcess(command, 0, *next(answers)),
        )
    for _ in range(2):  # the verdict of the first call holds for the second
        compilation.cache_compilations()
        directory = kept.get("jax_compilation_cache_dir")
        assert directory is None if rejected else Path(directory).parent.name == "valdi-jax"
    kept.clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    broken = tmp_path / "valdi-jax" / "jit_f-1-cache"
    broken.touch()
    compilation.cache_compilations()
    assert not broken.exists()
    assert kept == {
        "jax_compilation_cache_dir": str(tmp_path / "valdi-jax"),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    kept.clear()
    compilation.cache_compilations()
    assert kept == {}, "JAX reads the variable itself"
