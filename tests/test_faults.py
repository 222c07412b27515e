"""A run that is killed without warning resumes as if it had not been."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from valdi_jax.run import checkpoint
from valdi_jax.run.log import read_jsonl

HERE = Path(__file__).parent
EPISODES = 24


def start(directory, episodes=EPISODES):
    command = [sys.executable, HERE / "train_toy.py", directory, str(episodes)]
    with open(directory.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def finish(directory):
    process = start(directory)
    assert process.wait(timeout=600) == 0, directory.with_suffix(".log").read_text()


def content(directory):
    """Checksum of the whole content of the last checkpoint."""
    newest = checkpoint.latest(directory)
    assert checkpoint.verify(newest) == []
    return json.loads((newest / "manifest.json").read_text())["content"]


def metrics(directory):
    """Everything that was logged except times and memory."""
    return [
        {name: value for name, value in record.items() if not name.startswith(("time/", "memory/"))}
        for record in read_jsonl(directory / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "straight"
    finish(directory)
    return directory


def saved_episodes(directory):
    """Episodes in the newest checkpoint, 0 without one."""
    return max([int(path.name) for path in checkpoint.checkpoints(directory)], default=0)


def kill_at_random_moments(directory, rng, kills):
    """Start the run repeatedly, and kill it each time at some moment.

    Returns: the episodes saved at each kill; fewer kills if the run finished.
    """
    saved = []
    for _ in range(kills):
        goal = saved_episodes(directory) + rng.integers(1, 8)
        process = start(directory)
        while process.poll() is None and saved_episodes(directory) < goal:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))  # an episode or two, each with a checkpoint
        if process.poll() is not None:  # finished, which is not a kill
            assert process.returncode == 0
            break
        process.kill()
        process.wait()
        newest = checkpoint.latest(directory)
        assert checkpoint.verify(newest) == []
        assert checkpoint.verify_replay(directory, newest) == {}
        logged = len(read_jsonl(directory / "metrics.jsonl"))
        assert int(newest.name) >= logged - 1, "more than one checkpoint interval was lost"
        saved.append(int(newest.name))
    return saved


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(straight, tmp_path, kills):
    rng = np.random.default_rng(kills)
    saved = []
    while len(saved) < kills:  # at most five per run, each after some of its episodes
        directory = tmp_path / f"run-after-{len(saved)}"
        saved += kill_at_random_moments(directory, rng, min(kills - len(saved), 5))
        finish(directory)
        assert content(directory) == content(straight)
        assert metrics(directory) == metrics(straight)
    if kills == 50:  # they include the full ring, its order by number
        assert any(10 < episodes < 15 for episodes in saved), saved
        assert any(episodes > 15 for episodes in saved), saved
