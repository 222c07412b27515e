"""Several processes that learn together: as one does, and what faults of theirs do.

pytest -m slow tests/test_processes.py    the faults
"""

import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import train_together
from conftest import FAULTS
from rich.console import Console
from toy import CONFIG, make_counting
from train_together import HEARTBEAT, WATCHDOG

from valdi_jax.config import LearnConfig
from valdi_jax.errors import UsageError
from valdi_jax.run import checkpoint, rundir
from valdi_jax.run.learner import place, sharing
from valdi_jax.run.log import read_jsonl
from valdi_jax.run.processes import start
from valdi_jax.train import train
from valdi_jax.updates import shardings

HERE = Path(__file__).parent
SLACK = 30  # seconds more that any end may take, on a machine that does other work too
MANY = 500  # episodes: more than are reached


def alone(directory, episodes):
    config = train_together.configuration(episodes)
    resume = (directory / "config.json").exists()
    quiet = Console(file=io.StringIO())
    return train(config, directory, resume=resume, make=make_counting, console=quiet)


def together(directory, episodes, count=2, fault=""):
    """Start several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for rank in range(count):
        command = [sys.executable, HERE / "train_together.py", directory, str(episodes)]
        command += [str(count), str(rank), address]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "TOY_FAULT": fault}
        with open(directory.with_suffix(f".{rank}.log"), "a") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    return started


def said(directory):
    return "\n".join(path.read_text() for path in sorted(directory.parent.glob("*.log")))


def finish(directory, episodes):
    started = together(directory, episodes)
    try:
        assert [process.wait(timeout=300) for process in started] == [0, 0], said(directory)
    finally:
        for process in started:
            process.kill()


def saved_episodes(directory):
    return max([int(path.name) for path in rundir.checkpoints(directory)], default=0)


def test_two_processes_learn_like_one_and_share_its_checkpoints(tmp_path):
    straight, shared = tmp_path / "straight", tmp_path / "shared"
    expected = alone(straight, 7)
    finish(shared, 4)
    assert "learning on 2 of 2 processes" in said(shared)
    newest = rundir.latest(shared)
    assert checkpoint.verify(newest) == []
    assert checkpoint.verify_replay(shared, newest) == {}
    alone(shared, 5)
    assert rundir.load_config(shared).learn.processes == 1, "a run keeps no hardware"
    finish(shared, 7)
    assert saved_episodes(shared) == 7
    ours, theirs = (read_jsonl(run / "metrics.jsonl") for run in (straight, shared))
    assert ours[-1]["total/updates"] == theirs[-1]["total/updates"] == int(expected.step) > 9
    for one, two in zip(ours, theirs, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            if name.startswith(("loss/", "grad/", "value/", "episode/")):
                np.testing.assert_allclose(two[name], value, rtol=1e-5, err_msg=name)
    state, _ = checkpoint.load(
        rundir.latest(shared),
        *(train_together.EXAMPLE, rundir.load_config(shared)),
    )
    np.testing.assert_array_equal(state.step, expected.step)


def test_processes_that_cannot_be_found_are_asked_for(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(UsageError, match=r"--learn\.processes 2: .*--learn\.coordinator HOST"):
        start(LearnConfig(processes=2))


def test_what_several_processes_cannot_do_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "device_count", lambda: 6)
    with pytest.raises(UsageError, match=r"--learn\.devices is 3; 2 processes cannot have"):
        shardings(6, 3)
    with pytest.raises(UsageError, match=r"--learn\.devices is 1; 2 processes cannot have"):
        shardings(6, 1)
    assert sharing(CONFIG) == 2, "one of each"
    assert place(train_together.EXAMPLE, CONFIG) == "host"
    with pytest.raises(UsageError, match=r"--replay\.placement device is for one process"):
        place(train_together.EXAMPLE, CONFIG.replace(replay={"placement": "device"}))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert sharing(CONFIG) == 4, "as many as split a batch of 8, two of each"


def count(fault, outcome="held"):
    FAULTS.setdefault(fault, {"held": 0, "lost": 0, "silent": 0, "endless": 0})[outcome] += 1


def reach(directory, started, episodes):
    """Wait until so many episodes are saved."""
    deadline = time.monotonic() + 120
    while saved_episodes(directory) < episodes:
        assert time.monotonic() < deadline, said(directory)
        assert all(process.poll() is None for process in started), said(directory)
        time.sleep(0.01)


def end(directory, started, bound, fault):
    """Wait for the ends; returns the statuses and the seconds, both in the order of the ranks."""
    begun = time.monotonic()
    seconds = {}
    while len(seconds) < len(started) and time.monotonic() < begun + bound:
        for rank, process in enumerate(started):
            if rank not in seconds and process.poll() is not None:
                seconds[rank] = time.monotonic() - begun
        time.sleep(0.05)
    late = len(seconds) < len(started)
    for process in started:
        process.kill()
    if late:
        count(fault, "endless")
    assert not late, f"{seconds} in {bound} s\n{said(directory)}"
    print(f"{fault}: {[round(seconds[rank], 1) for rank in range(len(started))]} s")
    newest = rundir.latest(directory)
    assert checkpoint.verify(newest) == []
    assert checkpoint.verify_replay(directory, newest) == {}
    return [process.returncode for process in started], seconds


def resumes(directory, fault):
    """Two more episodes, in two processes again."""
    episodes = saved_episodes(directory) + 2
    finish(directory, episodes)
    assert saved_episodes(directory) == episodes
    count(fault)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_other(tmp_path, rank):
    directory, fault = tmp_path / "run", f"SIGKILL, process {rank}"
    started = together(directory, MANY)
    reach(directory, started, 3)
    started[rank].kill()
    statuses, _ = end(directory, started, HEARTBEAT + SLACK, fault)
    assert statuses[1 - rank] in (3, -signal.SIGABRT), said(directory)
    resumes(directory, fault)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_ends_the_other_and_ends_once_it_goes_on(tmp_path, rank):
    directory, fault = tmp_path / "run", f"SIGSTOP, process {rank}"
    started = together(directory, MANY)
    reach(directory, started, 3)
    started[rank].send_signal(signal.SIGSTOP)
    end(directory, [started[1 - rank]], HEARTBEAT + SLACK, fault)
    started[rank].kill()  # it holds the run's lock
    started[rank].wait()
    resumes(directory, fault)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_sleeps_ends_all(tmp_path, rank):
    directory, fault = tmp_path / "run", f"sleeping, process {rank}"
    started = together(directory, MANY, fault=f"sleep:{rank}:8")
    reach(directory, started, 4)
    statuses, _ = end(directory, started, WATCHDOG + SLACK, fault)
    assert 3 in statuses
    assert set(statuses) <= {3, -signal.SIGABRT}
    assert "no update and no new episode for 45 s (--learn.watchdog)" in said(directory)
    resumes(directory, fault)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_is_named_by_the_other(tmp_path, rank):
    directory, fault = tmp_path / "run", f"exception, process {rank}"
    started = together(directory, MANY, fault=f"raise:{rank}:8")
    reach(directory, started, 4)
    end(directory, started, HEARTBEAT + SLACK, fault)
    assert f"process {rank} has ended: OSError: the road is closed" in said(directory)
    resumes(directory, fault)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_stops_all_at_the_same_update(tmp_path, rank, name):
    directory, fault = tmp_path / "run", f"{name}, process {rank}"
    started = together(directory, MANY, fault="slow:0:0")
    reach(directory, started, 3)
    time.sleep(1.5)  # into the updates of the next episode
    started[rank].send_signal(signal.Signals[name])
    statuses, _ = end(directory, started, SLACK, fault)
    assert statuses == [130, 130], said(directory)
    manifest = checkpoint.read_signed(rundir.latest(directory) / checkpoint.MANIFEST)
    assert f"made {manifest['updates']} updates" in said(directory), "the other made as many"
    resumes(directory, fault)
