"""Behaviour cloning of recorded data (experiments/cloning.py)."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from valdi_jax.data.episode import Episode
from valdi_jax.errors import UsageError
from valdi_jax.observation import Observation
from valdi_jax.record import main as record_main

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cloning(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    return importlib.import_module("cloning")


def test_a_clone_acts_as_recorded(cloning):
    """Inputs of unlike sizes, and one that never changes; the last observation has no action."""
    rng = np.random.default_rng(0)
    seen = rng.normal(size=(3, 101, 3)).astype(np.float32) * (100, 0.01, 0)
    wanted = np.tanh(seen[..., :1] / 100 - seen[..., 1:2] / 0.01)
    episodes = [
        Episode(
            observations=Observation(vector=vectors.astype(np.float32)),
            actions=actions[:-1].astype(np.float32),
            rewards=np.zeros(100, np.float32),
            terminated=False,
            truncated=True,
            seed=0,
        )
        for vectors, actions in zip(seen, wanted, strict=True)
    ]
    act = cloning.clone(episodes, updates=1000, seed=0)
    given = np.stack([act(vector) for vector in seen[0]])
    assert np.abs(given - wanted[0]).mean() < 0.05 < np.abs(wanted[0]).mean()


def test_it_is_scored_beside_the_data(cloning, tmp_path, monkeypatch, capsys):
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    name = "minari:pendulum/random-v0"
    record_main([name, "--episodes", "2", "--env", "pendulum"])
    options = ["--episodes", "1", "--updates", "10", "--seeds", "0", "1"]
    cloning.main([name, *options, "--json", str(tmp_path / "rows.json")])
    assert f"| {name} |  | 2 | -" in capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["agent"], row.get("seed"), row["episodes"]) for row in rows] == [
        (name, None, 2),
        ("clone", 0, 1),
        ("clone", 1, 1),
    ]
    with pytest.raises(UsageError, match="carracing observes images"):
        cloning.main([name, "--env", "carracing"])
