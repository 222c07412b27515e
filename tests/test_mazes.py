"""Diffuser in point mazes: the script that scores it."""

import importlib
import json
from pathlib import Path

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

DRIVEN = {"controller": 20.0, "random": 0.0}


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


def test_a_plan_is_worth_the_steps_that_it_spends_at_the_goal(mazes):
    there = np.array([0, 0, 0, 0, 1, 1, 0, 1])[:, None]  # at 4, gone at 6, then it stays
    way = mazes.Way(there * np.ones(2), np.zeros((1, 2)), np.ones(2))
    # Steps 4 and 5, and from 7 on: the first observation is step 0 and brings no reward.
    assert mazes.worth(way, 300) == 2 + 300 - 6
    assert mazes.worth(way, 5) == 2
    gone = mazes.Way(way.planned[:-1], way.driven, way.goal)
    assert mazes.worth(gone, 300) == 2


def test_the_plans_are_those_that_it_follows(mazes, agent):
    agent = Agent(agent.params, agent.config.replace(env={"max_steps": 60}))
    returns, ways = mazes.run(agent, 3)
    assert len(returns) == len(ways) == 3
    for way in ways:
        assert way.planned.shape == (8, 2)
        assert way.driven.shape == (61, 2)
        # Both ends are pinned, within what an untrained scaler knows.
        np.testing.assert_allclose(way.planned[0], np.clip(way.driven[0], -1, 1), atol=1e-4)
        np.testing.assert_allclose(way.planned[-1], np.clip(way.goal, -1, 1), atol=1e-4)
    spread = np.std([way.planned[4] for way in ways], axis=0)
    assert spread.max() > 0, "each episode has its plan"


def test_scores_are_normalized_with_d4rls_references_and_with_the_controllers(mazes):
    returns = {"Diffuser": [161.86, 161.86], "controller": [220.0, 180.0], "random": [0.0, 20.0]}
    diffuser, controller, random = mazes.rows_of("umaze", "own goal", returns)
    assert diffuser["d4rl_normalized"] == pytest.approx(100)
    assert diffuser["own_normalized"] == pytest.approx(100 * (161.86 - 10) / 190)
    assert (controller["own_normalized"], random["own_normalized"]) == (100, 0)
    assert random["reached"] == 0.5
    worse = mazes.rows_of("umaze", "own goal", returns | {"controller": [0.0, 10.0]})
    assert worse[0]["own_normalized"] is None
    assert mazes.line({"standard_error": None} | worse[0]).endswith(" -")


def test_the_script_scores_and_draws_both_tasks(mazes, agent, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(mazes.Agent, "load", lambda _: agent)
    seen, run = [], mazes.run

    def running(agent, *rest):
        _, ways = run(agent, *rest)
        seen.append((agent.config.env.name, ways[0].planned.shape))
        return [3.0, 5.0], ways

    monkeypatch.setattr(mazes, "run", running)
    monkeypatch.setattr(mazes, "drive", lambda _, make, jobs: [DRIVEN[make.__name__]] * len(jobs))
    results, figure = tmp_path / "mazes.json", tmp_path / "mazes.png"
    words = ["AGENT", "--quick", "--horizon", "16", "--json", str(results), "--figure", str(figure)]
    assert mazes.main(words) == 0
    assert seen == [("maze:umaze", (16, 2)), ("maze:umaze-multi", (16, 2))]
    file = json.loads(results.read_text())
    assert file["command"].endswith(f"mazes.py {' '.join(words)}")
    means = {(row["task"], row["driver"]): row["mean"] for row in file["rows"]}
    for task in mazes.TASKS:
        assert means[task, "Diffuser"] == 4
        assert means[task, "controller"] == 20
        assert means[task, "random"] == 0
    assert len(means) == 8
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "own goal    controller      20.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["pendulum"], "pendulum is of pendulum, and not of a maze"),
        (["pendulum", "--horizon", "1"], "--horizon is 1"),
    ],
)
def test_what_cannot_be_scored_is_refused(mazes, words, complaint):
    with pytest.raises(UsageError, match=complaint):
        mazes.main(words)
