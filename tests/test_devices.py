import io
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from rich.console import Console
from toy import CONFIG, make_counting

from valdi_jax.errors import UsageError
from valdi_jax.run.learner import sharing
from valdi_jax.train import train
from valdi_jax.updates import shardings

HERE = Path(__file__).parent


def run(directory, episodes, resume=False):
    config = CONFIG.replace(collect={"episodes": episodes})
    return train(
        config, directory, resume=resume, make=make_counting, console=Console(file=io.StringIO())
    )


def test_eight_devices_learn_like_one_and_share_its_checkpoints(tmp_path):
    run(tmp_path / "run", 3)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, HERE / "several_devices.py", tmp_path / "run", "4"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "all of it held" in done.stdout, done.stderr
    assert int(run(tmp_path / "run", 6, resume=True).step) == 12  # and back on one device


def test_as_many_accelerators_learn_as_split_the_batch(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 6)
    assert sharing(CONFIG) == 1, "of a CPU's"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert sharing(CONFIG) == 4
    assert sharing(CONFIG.replace(learn={"devices": 6})) == 6, "what is asked for may be refused"


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    with pytest.raises(UsageError, match=r"is 8; 3 devices .*another --learn\.devices"):
        shardings(8, 3)
    with pytest.raises(UsageError, match=r"--learn\.devices is 4; there are 3"):
        shardings(8, 4)
