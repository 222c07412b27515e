"""The scripts of the paper's Figure 3 and Table 1: what they compute, keep and write."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from valdi_jax import Agent, model
from valdi_jax.data.source import evaluation_jobs
from valdi_jax.errors import UsageError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def script(monkeypatch):
    """Import an experiment as it is imported when started: its folder leads the path."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    return importlib.import_module


def start(name, *arguments, cwd):
    command = [sys.executable, ROOT / "experiments" / name, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read(path, name):
    """The rows of a file of results; its header must say what made them."""
    data = json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN, Infinity
    assert set(data) == {"command", "commit", "versions", "cpu", "device", "rows"}
    assert data["command"].startswith(f"python experiments/{name} pendulum --quick")
    assert set(data["versions"]) == {"python", "jax", "jaxlib", "flax", "numpy", "valdi_jax"}
    return data["rows"]


def test_the_sweep_of_steps_is_written_drawn_and_computed_once(tmp_path):
    name, path = "steps_sweep.py", tmp_path / "steps.json"
    options = ["pendulum", "--quick", "--json", "steps.json", "--figure", "steps.png"]
    first = start(name, *options, cwd=tmp_path)
    rows = read(path, name)
    assert [(row["agent"], row["steps"], row["episodes"]) for row in rows] == [
        ("pendulum", 1, 2),
        ("pendulum", 2, 2),
    ]
    for row in rows:
        assert -2000 < row["mean"] < 0 < row["standard_error"]
        assert row["plan_ms"] > 0
        assert 0 < row["variety"] < 10
    assert rows[0]["variety"] != rows[1]["variety"]
    assert "| pendulum | 2 | " in first
    figure = tmp_path / "steps.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    figure.unlink()
    written = path.stat().st_mtime_ns
    assert start(name, *options, cwd=tmp_path) == first  # times a plan included
    assert path.stat().st_mtime_ns == written
    assert figure.exists()


def test_value_diagnostics_are_written_for_every_step_of_the_plan(tmp_path):
    name = "value_diagnostics.py"
    printed = start(name, "pendulum", "--quick", "--json", "values.json", cwd=tmp_path)
    (row,) = read(tmp_path / "values.json", name)
    assert [cell["h"] for cell in row["td"]] == [0, 1, 2, 3, 4]
    assert [cell["count"] for cell in row["td"]] == [8] * 5
    assert [cell["h"] for cell in row["drift"]] == [1, 2, 3, 4, 5]
    assert [cell["count"] for cell in row["drift"]] == [29, 28, 27, 26, 25]  # of 30 decisions
    for cell in row["td"] + row["drift"]:
        assert np.isfinite(cell["mean"])
        assert cell["standard_error"] > 0
    assert printed.count("\n| pendulum | ") == 2
    assert "| paper, CarRacing: MLP | -0.62 | " in printed


def test_an_interrupted_sweep_goes_on_where_it_was(script, monkeypatch, tmp_path, capsys):
    sweep = script("steps_sweep")
    path, calls = tmp_path / "steps.json", []

    def score(agent, steps, futures, episode):
        calls.append((steps, episode) if futures == 1 else (steps, futures, episode))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 10.0 * episode - (steps or 0) * (1 + 2 * episode), 2.0

    monkeypatch.setattr(sweep, "score", score)
    monkeypatch.setattr(sweep, "variety", lambda agent, steps, states, rollouts: 0.5)
    monkeypatch.setattr(sweep.evidence, "states", lambda agent, count: f"{count} pairs")
    command = ["pendulum", "lunarlander", "--json", str(path)]
    command += ["--steps", "1", "4"]
    with pytest.raises(KeyboardInterrupt):
        sweep.main([*command, "--episodes", "2"])
    assert [row["returns"] for row in json.loads(path.read_text())["rows"]] == [[-1.0]]
    capsys.readouterr()
    sweep.main([*command, "--episodes", "2"])
    once = [(1, 0), (1, 1), (1, 1), (4, 0), (4, 1), (None, 0), (None, 1)]
    assert calls == once  # one episode more than once: it was interrupted; an MLP takes no steps
    # -3 and -9 from 1 to 4 steps
    assert "| pendulum | 4 | 1 | -3 ± 1 | -6 ± 3 | 2.0 | 0.5000 |" in capsys.readouterr().out
    sweep.main([*command, "--episodes", "3"])
    assert calls[7:] == [(1, 2), (4, 2), (None, 2)]
    sweep.main([*command, "--episodes", "2"])
    assert len(calls) == 10
    assert "| pendulum | 4 | 1 | -3 ± 1 | -6 ± 3 |" in capsys.readouterr().out.rsplit("agent", 1)[1]
    assert [len(row["returns"]) for row in json.loads(path.read_text())["rows"]] == [3, 3, 3]
    sweep.main([*command, "--episodes", "1", "--steps", "1", "4x2"])
    assert calls[10:] == [(4, 2, 0)]  # an MLP has no futures
    other = tmp_path / "other.json"
    command[command.index(str(path))] = str(other)
    sweep.main([*command, "--episodes", "3", "--known", str(path)])
    assert len(calls) == 11
    assert [len(row["returns"]) for row in json.loads(other.read_text())["rows"]] == [3, 3, 3, 1]
    other.write_text('{"rows": [{"agent": "pendulum"}]}')
    for words in (["--steps", "8x0"], ["--steps", "5000"], ["--episodes", "101"]):
        with pytest.raises(UsageError, match=words[1].removeprefix("8x")):
            sweep.main([*command, *words])
    with pytest.raises(UsageError, match=r"other.json is not what the scripts write"):
        sweep.main(command)


def test_the_spread_is_the_mean_distance_of_pairs(script):
    latents = jnp.array([[0.0, 0.0], [6.0, 8.0], [0.0, 8.0]])  # distances 10, 8 and 6
    np.testing.assert_allclose(script("steps_sweep").spread(latents), 8 / np.sqrt(2), rtol=1e-6)


def test_td_errors_are_those_of_given_heads(script):
    trajectory = jnp.array([[1.0, 0.0], [2.0, 1.0], [4.0, 3.0]])
    chunks = jnp.array([[0.5], [-1.0]])
    errors = script("value_diagnostics").td_errors(
        lambda z, a: z[:, 1] + 10 * a[:, 0], lambda z: 100 * z[:, 0], trajectory, chunks, 0.5
    )
    # 5 + 0.5 * 200 - 100, then 1 - 10 + 0.5 * 400 - 200
    np.testing.assert_allclose(errors, [5.0, -9.0])


def test_drift_compares_what_came_with_what_was_imagined_for_then(script):
    values = np.array([[10, 1, 2], [20, 3, 4], [40, 5, 6], [80, 7, 8]])
    one, two = script("value_diagnostics").drifts(values)
    np.testing.assert_array_equal(one, [20 - 1, 40 - 3, 80 - 5])
    np.testing.assert_array_equal(two, [40 - 2, 80 - 4])
    assert [len(rest) for rest in script("value_diagnostics").drifts(values[:1])] == [0, 0]


def test_a_decision_sees_what_the_chunk_before_led_to(script, monkeypatch):
    diagnostics = script("value_diagnostics")
    config = Agent.load("pendulum").config.replace(model={"chunk": 3})

    def decide(params, observation, keys, decision, carry, *, config):
        return np.full((3, 1), 0.5), carry, observation.vector, np.full(2, decision)

    monkeypatch.setattr(diagnostics, "decide", decide)
    agent = SimpleNamespace(
        params={}, config=config, make_env=lambda: gym.make("Pendulum-v1", max_episode_steps=14)
    )
    jobs = evaluation_jobs(2)
    values, errors = diagnostics.drive(agent, jobs, 4)
    env = agent.make_env()
    for job, seen in zip(jobs, values, strict=True):
        expected = [env.reset(seed=job.seed)[0]]
        expected += [env.step(np.float32([1.0]))[0] for _ in range(11)]  # 0.5 of the bound 2
        np.testing.assert_array_equal(seen, expected[::3])
    np.testing.assert_array_equal(errors[1], [[0, 0], [1, 1], [2, 2], [3, 3]])
    (ended, _), _ = diagnostics.drive(agent, jobs, 99)
    assert len(ended) == 5  # 14 steps


def test_states_are_spread_over_all_episodes(script):
    spread_over = script("value_diagnostics").spread_over
    episodes = [np.arange(4), np.arange(10, 13)]
    few = spread_over(episodes, 3)
    assert [x.tolist() for x in few] == [[0, 3], [12]]
    assert [x.tolist() for x in spread_over(episodes, 99)] == [[0, 1, 2, 3], [10, 11, 12]]


def test_futures_differ_by_the_noise_alone(script):
    sweep = script("steps_sweep")
    for name, differ in (("lunarlander", False), ("pendulum", True)):  # an MLP imagines one
        agent = Agent.load(name)
        sizes, config = agent.config.model, agent.config.graph
        z = jnp.zeros((2, sizes.latent_dim))
        chunks = jnp.zeros((2, sizes.horizon, sizes.chunk * sizes.action_dim))
        latents = sweep.imagine(
            agent.params, z, chunks, jax.random.key(0), config=config, rollouts=3
        )
        assert latents.shape == (2, 3, sizes.horizon, sizes.latent_dim)
        for last in latents[:, :, -1]:
            assert (sweep.spread(last) > 1e-3) == differ


def test_an_agent_without_what_a_script_needs_is_refused(script):
    evidence = script("evidence")
    assert "value" in evidence.load("pendulum", "dynamics", "value").params
    with pytest.raises(UsageError, match="pendulum has no prior and no policy network"):
        evidence.load("pendulum", "prior", "value", "policy")


def test_states_are_spread_over_the_episode_with_plans_made_there(script):
    agent = Agent.load("pendulum")
    agent.config = agent.config.replace(env={"max_steps": 8 * agent.config.model.chunk})
    states = script("evidence").states(agent, 3)
    assert states.decisions == [0, 4, 7]  # 3.5 is rounded to even
    observations = jax.tree.map(lambda x: x[np.array([0, 4, 7])], states.episode.observations)
    np.testing.assert_allclose(
        states.z, model.encode(agent.params, observations, config=agent.config), rtol=1e-5
    )
    np.testing.assert_array_equal(states.plans.actions, agent.plan(observations).actions)
    sizes = agent.config.model
    assert states.chunks.shape == (3, sizes.horizon, sizes.chunk * sizes.action_dim)
    np.testing.assert_array_equal(
        states.chunks.reshape(states.plans.actions.shape), states.plans.actions
    )


def test_a_table_has_a_line_a_row_and_errors_where_there_are_any(script):
    evidence = script("evidence")
    rows = [["mine", evidence.plus_minus(1.25, 0.5, 1)], ["", evidence.plus_minus(-20, None, 0)]]
    assert evidence.markdown(["agent", "return"], rows).splitlines() == [
        "| agent | return |",
        "|---|---|",
        "| mine | 1.2 ± 0.5 |",
        "|  | -20 |",
    ]


def test_the_band_of_training_curves_covers_what_runs_differ_by(script):
    interval = script("training_curves").interval
    same = np.tile(np.array([1.0, 5.0]), (3, 1))
    np.testing.assert_array_equal(interval(same), same[:2])
    low, high = interval(np.array([[0.0, 3.0], [1.0, 3.0], [2.0, 3.0]]))
    np.testing.assert_allclose([low[0], high[0]], [0, 2], atol=0.35)
    np.testing.assert_array_equal([low[1], high[1]], [3, 3])


def test_a_trial_keeps_the_options_that_are_given(script):
    parser = argparse.ArgumentParser()
    parser.add_argument("--states", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--quick", action="store_true")
    quick = {"states": 2, "pairs": 2}
    parse = script("evidence").parse
    assert vars(parse(parser, ["--states", "100"], quick))["pairs"] == 100
    trial = parse(parser, ["--quick", "--states", "100"], quick)
    assert (trial.states, trial.pairs) == (100, 2)


def test_what_is_no_run_has_no_curve(script, tmp_path):
    with pytest.raises(UsageError, match="mine is not LABEL=RUN"):
        script("training_curves").main(["mine"])
    with pytest.raises(UsageError, match="is not a run directory"):
        script("keep_run").main([str(tmp_path), str(tmp_path / "kept")])
    assert not (tmp_path / "kept").exists()
