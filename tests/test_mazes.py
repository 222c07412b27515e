"""Diffuser in point mazes: the script that scores it."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from valdi_jax import Agent
from valdi_jax.config import UNetConfig
from valdi_jax.data.source import evaluation_jobs
from valdi_jax.errors import UsageError
from valdi_jax.model import init_params
from valdi_jax.observation import Observation
from valdi_jax.presets import default_config


@pytest.fixture
def mazes(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "experiments")
    return importlib.import_module("mazes")


@pytest.fixture(scope="module")
def agent():
    """An untrained one."""
    unet = UNetConfig(width=8, multipliers=(1, 2), timesteps=2, scaler="limits", goal=2)
    model = {"horizon": 7, "action_dim": 2, "state_dim": 4, "unet": unet}
    config = default_config("maze:umaze", None).replace(model=model, env={"max_steps": 300})
    example = Observation(vector=np.zeros(6, np.float32))
    return Agent(init_params(jax.random.key(0), example, config=config), config)


def test_the_controller_reaches_the_goal_and_random_actions_rarely(mazes, agent):
    jobs = evaluation_jobs(4)
    assert min(mazes.drive(agent, mazes.controller, jobs)) > 100
    assert np.mean(mazes.drive(agent, mazes.random, jobs)) < 100


def test_a_plan_is_worth_the_steps_that_it_spends_at_the_goal(mazes, agent, monkeypatch):
    def plan(first):
        start, goal = first[:, None, :2], first[:, None, 4:6]
        share = np.array([0, 0, 0, 0, 1, 1, 0, 1])[:, None]  # there at 4, gone at 6, then stays
        states = start + share * (goal - start)
        rows = np.concatenate([np.zeros_like(states), states, np.zeros_like(states)], axis=-1)
        return SimpleNamespace(carry=SimpleNamespace(rows=rows))

    monkeypatch.setattr(agent, "plan", plan)
    # Steps 4 and 5, and from 7 on: the first observation is step 0 and brings no reward.
    assert mazes.follow_plans(agent, evaluation_jobs(6)) == [2 + 300 - 6] * 6


def test_scores_are_normalized_with_d4rls_references_and_with_the_controllers(mazes):
    returns = {"Diffuser": [161.86, 161.86], "controller": [220.0, 180.0], "random": [0.0, 20.0]}
    diffuser, controller, random = mazes.rows_of("umaze", "own goal", returns)
    assert diffuser["d4rl_normalized"] == pytest.approx(100)
    assert diffuser["own_normalized"] == pytest.approx(100 * (161.86 - 10) / 190)
    assert (controller["own_normalized"], random["own_normalized"]) == (100, 0)
    assert random["reached"] == 0.5


def test_the_script_scores_and_draws_both_tasks(mazes, agent, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(mazes.Agent, "load", lambda _: agent)
    results, figure = tmp_path / "mazes.json", tmp_path / "mazes.png"
    words = ["AGENT", "--quick", "--horizon", "16", "--json", str(results), "--figure", str(figure)]
    monkeypatch.setattr(sys, "argv", ["mazes.py", *words])
    assert mazes.main(words) == 0
    rows = json.loads(results.read_text())["rows"]
    assert {(row["task"], row["driver"]) for row in rows} == {
        (task, driver)
        for task in ("own goal", "drawn goal")
        for driver in ("Diffuser", "its plans", "controller", "random")
    }
    assert all(0 <= row["mean"] <= 20 for row in rows)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "own goal" in capsys.readouterr().out


def test_an_agent_of_another_environment_is_refused(mazes):
    with pytest.raises(UsageError, match="pendulum is no Diffuser of a maze"):
        mazes.main(["pendulum"])
