"""Faults, each at some random moment or place; a run must end as if there had been none.

pytest -m slow tests/test_faults.py       all of them, with a table at the end
pytest -m disk tests/test_faults.py       those of disks, which need the right to mount one
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import FAULTS

from valdi_jax import checkpoint as listing
from valdi_jax.errors import UsageError
from valdi_jax.run import checkpoint, rundir
from valdi_jax.run.log import read_jsonl

HERE = Path(__file__).parent
EPISODES = 24
WAYS = ("plain", "workers", "lag", "device")


def start(directory, way="plain", episodes=EPISODES, **options):
    command = [sys.executable, HERE / "train_toy.py", directory, str(episodes), way]
    with open(directory.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=_heed, **options)


def _heed():
    """In the background, shells have their children ignore signals."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_DFL)


def finish(directory, way="plain", episodes=EPISODES):
    process = start(directory, way, episodes)
    assert process.wait(timeout=600) == 0, directory.with_suffix(".log").read_text()


def content(directory):
    """Checksum of the whole content of the last checkpoint."""
    newest = rundir.latest(directory)
    assert checkpoint.verify(newest) == []
    return json.loads((newest / "manifest.json").read_text())["content"]


def metrics(directory):
    """Everything that was logged except times and memory."""
    return [
        {name: value for name, value in record.items() if not name.startswith(("time/", "memory/"))}
        for record in read_jsonl(directory / "metrics.jsonl")
    ]


def count(fault, outcome="held", times=1):
    """Enter outcomes into the table that is printed at the end."""
    FAULTS.setdefault(fault, {"held": 0, "lost": 0, "silent": 0, "endless": 0})[outcome] += times


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run without faults in each way, made when asked for."""
    made = {}

    def make(way="plain", episodes=EPISODES):
        name = f"straight-{way}-{episodes}"
        if name not in made:
            made[name] = tmp_path_factory.mktemp("runs") / name
            finish(made[name], way, episodes)
        return made[name]

    return make


def saved_episodes(directory):
    """Episodes in the newest checkpoint, 0 without one."""
    return max([int(path.name) for path in rundir.checkpoints(directory)], default=0)


def end_at_random_moments(directory, way, rng, times, signum, episodes=EPISODES):
    """Start the run repeatedly, and end it each time at some moment by a signal.

    Returns: the episodes saved at each end; fewer if the run finished.
    """
    each = 2 if way in ("workers", "lag") else 1  # episodes of a round
    saved, stopped = [], 0
    for _ in range(times):
        goal = saved_episodes(directory) + rng.integers(1, episodes // 3)
        process = start(directory, way, episodes)
        while process.poll() is None and saved_episodes(directory) < goal:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))  # an episode or two, each with a checkpoint
        if process.poll() is not None:  # finished, which is not an end by a signal
            assert process.returncode == 0
            break
        process.send_signal(signum)
        status = process.wait(timeout=120)
        if signum != signal.SIGKILL:
            # It may just have ended by itself, and be leaving the interpreter.
            whole = saved_episodes(directory) == episodes
            assert status == 130 or (status in (0, -signum) and whole), status
            stopped += status == 130
        newest = rundir.latest(directory)
        assert checkpoint.verify(newest) == []
        assert checkpoint.verify_replay(directory, newest) == {}
        logged = len(read_jsonl(directory / "metrics.jsonl"))
        assert int(newest.name) >= logged - each, "more than one checkpoint interval was lost"
        saved.append(int(newest.name))
    assert signum == signal.SIGKILL or stopped
    return saved


@pytest.mark.parametrize(
    ("way", "kills", "episodes"),
    [
        ("plain", 2, 12),
        *(
            pytest.param(way, 50 if way == "plain" else 17, EPISODES, marks=pytest.mark.slow)
            for way in WAYS
        ),
    ],
)
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(
    straight, tmp_path, way, kills, episodes
):
    rng = np.random.default_rng([kills, *way.encode()])
    saved = []
    while len(saved) < kills:  # at most five per run, each after some of its episodes
        directory = tmp_path / f"run-after-{len(saved)}"
        moments = end_at_random_moments(
            directory, way, rng, min(kills - len(saved), 5), signal.SIGKILL, episodes
        )
        saved += moments
        finish(directory, way, episodes)
        assert content(directory) == content(straight(way, episodes))
        assert metrics(directory) == metrics(straight(way, episodes))
        count(f"SIGKILL, {way}", times=len(moments))
    if kills == 50:  # they include the full ring, its order by number
        assert any(10 < episodes < 15 for episodes in saved), saved
        assert any(episodes > 15 for episodes in saved), saved


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_run_told_to_stop_saves_and_ends_as_one_that_was_not(straight, tmp_path, way, name):
    rng = np.random.default_rng([*way.encode(), *name.encode()])
    directory = tmp_path / "run"
    moments = end_at_random_moments(directory, way, rng, 4, signal.Signals[name])
    finish(directory, way)
    assert content(directory) == content(straight(way))
    count(name, times=len(moments))


@pytest.mark.slow
def test_a_worker_that_dies_or_hangs_changes_nothing(straight, tmp_path):
    for trial, signum in enumerate([signal.SIGKILL, signal.SIGSTOP] * 4):
        directory = tmp_path / f"run-{trial}"
        process = start(directory, "workers", env={**os.environ, "TOY_TIMEOUT": "2"})
        deadline = time.monotonic() + 120
        wanted = 2 * (1 + trial)
        while saved_episodes(directory) < wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        children = [
            int(child)
            for task in Path(f"/proc/{process.pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
        workers = [pid for pid in children if "resource_tracker" not in _command(pid)]
        os.kill(random.Random(trial).choice(workers), signum)
        assert process.wait(timeout=300) == 0, directory.with_suffix(".log").read_text()
        assert "environment workers died" in directory.with_suffix(".log").read_text()
        assert content(directory) == content(straight("workers"))
        count(f"worker, {signum.name}")


def _command(pid):
    return Path(f"/proc/{pid}/cmdline").read_text()


@pytest.mark.slow
def test_a_flipped_bit_in_a_checkpoint_an_episode_or_the_configuration_is_found(straight):
    directory = straight()
    rng = np.random.default_rng(0)
    newest = rundir.latest(directory)
    groups = {
        "checkpoint": [path for path in newest.rglob("*") if path.is_file()],
        "replay": [
            directory / "replay" / f"{number:08d}.npz"
            for number in checkpoint.replay_digests(newest)
        ],
        "config.json": [directory / "config.json"],
    }
    for group, paths in groups.items():
        for _ in range(200):
            path = paths[rng.integers(len(paths))]
            intact = path.read_bytes()
            changed = bytearray(intact)
            if not changed:
                continue
            place = int(rng.integers(8 * len(changed)))
            changed[place // 8] ^= 1 << place % 8
            path.write_bytes(bytes(changed))
            try:
                if group == "config.json":
                    with pytest.raises(UsageError):
                        rundir.load_config(directory)
                else:
                    found = checkpoint.verify(newest) or checkpoint.verify_replay(directory, newest)
                    assert found, (path, place)
            except BaseException:
                count(f"flipped bit, {group}", "silent")
                raise
            finally:
                path.write_bytes(intact)
            count(f"flipped bit, {group}")


@pytest.mark.slow
def test_two_starts_in_one_directory_never_mix(straight, tmp_path):
    for trial in range(6):
        directory = tmp_path / f"run-{trial}"
        both = [start(directory) for _ in range(2)]
        statuses = sorted(process.wait(timeout=300) for process in both)
        assert statuses == [0, 2], directory.with_suffix(".log").read_text()
        assert content(directory) == content(straight())
        count("two starts in one directory")


@pytest.mark.slow
def test_a_listing_beside_training_never_speaks_of_damage(tmp_path, capsys):
    directory = tmp_path / "run"
    process = start(directory)
    while not saved_episodes(directory):
        time.sleep(0.05)
    while process.poll() is None:
        assert listing.main([str(directory)]) == 0, capsys.readouterr().out
        count("listing beside training")
    assert process.returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of a number of bytes; a later call resizes it."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = False

    def mount(size):
        nonlocal mounted
        options = f"{'remount,' if mounted else ''}size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "none", directory]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a disk")
        mounted = True
        return directory

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", directory], check=True)


@pytest.mark.slow
@pytest.mark.disk
@pytest.mark.parametrize("share", [0.02, 0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97])
def test_a_full_disk_is_survived_or_ends_the_run_with_a_sentence(straight, small_disk, share):
    whole = sum(path.stat().st_blocks * 512 for path in straight().rglob("*"))
    directory = small_disk(int(1.5 * share * whole)) / "run"  # a checkpoint more while it is saved
    log = directory.parent.parent / "log"
    with open(log, "w") as file:
        command = [sys.executable, HERE / "train_toy.py", directory, str(EPISODES)]
        process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            status = process.wait(timeout=300)
        except subprocess.TimeoutExpired:
            count("full disk", "endless")
            process.kill()
            raise
    assert status in (0, 2, 3), log.read_text()
    assert "Traceback" not in log.read_text()
    if status == 0:
        assert content(directory) == content(straight())
    small_disk(10 * whole)
    if status == 2 and not (directory / "config.json").exists():  # not even a beginning
        subprocess.run(["rm", "-rf", directory], check=True)
    with open(log, "a") as file:
        subprocess.run(command, stdout=file, stderr=file, check=True, timeout=300)
    assert content(directory) == content(straight())
    count("full disk")
