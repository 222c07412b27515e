"""What is done with replayed latents: fitting an agent to several steps, and judging scores."""

import ast
import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from valdi_jax import Agent, losses, model
from valdi_jax.dynamics import DYNAMICS
from valdi_jax.errors import UsageError
from valdi_jax.losses import reward, value
from valdi_jax.observation import Observation
from valdi_jax.planners import draw_futures
from valdi_jax.planners.scoring import predicted_return
from valdi_jax.run import checkpoint, npz, rundir
from valdi_jax.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few Pendulum episodes, as the packaged agent would have them."""
    directory = tmp_path_factory.mktemp("runs") / "pendulum"
    config = Agent.load("pendulum").config.replace(
        env={"max_steps": 60},
        collect={"episodes": 4, "seed_episodes": 4},
        eval={"every": 0},
    )
    train(config, directory)
    return directory


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "experiments")
    return importlib.import_module


@pytest.fixture
def refit(script):
    return script("refit")


@pytest.fixture
def quality(script):
    return script("score_quality")


@pytest.fixture
def replay(refit, run):
    return refit.evidence.encoded(Agent.load("pendulum"), [run], lambda numbers: numbers)


def test_shortcuts_arrive_where_many_steps_do(refit, run, tmp_path, capsys):
    options = ["pendulum", "--data", str(run), "--batch-size", "32"]
    refit.main([*options, "--shortcut", "200", "--heads", "2", "--out", str(tmp_path / "new")])
    lines = capsys.readouterr().out.splitlines()
    before, after = (ast.literal_eval(line.split(":", 1)[1].strip()) for line in lines[:2])
    assert list(before) == [1, 2, 4, 8]
    assert after[1] < 0.95 * before[1]
    given = Agent.load("pendulum")
    for steps in (1, 2, 4, 8):
        agent = Agent.load(tmp_path / "new" / str(steps))
        assert agent.config.planner.diffusion_steps == steps
        jax.tree.map(
            np.testing.assert_array_equal, agent.params["encoder"], given.params["encoder"]
        )
        for name in ("dynamics", "reward", "value"):
            pairs = zip(
                *map(jax.tree.leaves, (agent.params[name], given.params[name])), strict=True
            )
            assert any((a != b).any() for a, b in pairs), name
    with pytest.raises(UsageError, match="exists already"):
        refit.main([*options, "--heads", "2", "--out", str(tmp_path / "new")])


def test_untrained_shortcuts_are_the_given_world_model(refit, replay):
    agent = Agent.load("pendulum")
    dynamics, timesteps = agent.params["dynamics"], agent.config.model.diffusion_timesteps
    table = np.tile(dynamics[refit.TABLE], (refit.FINEST + 1, 1))
    for level in (0, 3, refit.FINEST):
        one = refit.at_level(dynamics | {refit.TABLE: table}, level, timesteps)
        jax.tree.map(np.testing.assert_array_equal, one, dynamics)
    found = refit.distances({32: dynamics}, dynamics, replay, config=agent.config)
    assert found == {32: 0.0}


def test_the_heads_learn_what_training_lets_them_learn(refit, run, replay):
    agent = Agent.load("pendulum")
    config, params = agent.config, agent.params
    drawn = replay.draw(np.random.default_rng(0), 16)
    key = jax.random.key(3)
    found = refit.heads_loss(
        *(params, params, params["dynamics"], replay.gather(drawn), key), config=config, steps=0
    )
    seen = npz.load_episode(run, 0, Observation(vector=np.zeros(3, np.float32)), config)
    assert len(seen.observations.vector) == 61
    original = refit.Replay(config)
    for number in checkpoint.replay_digests(rundir.latest(run)):
        example = Observation(vector=np.zeros(3, np.float32))
        original.give(npz.load_episode(run, number, example, config))
    batch = original.gather(drawn)
    world = DYNAMICS[config.model.dynamics]
    draws = {"dynamics": world.draw(jax.random.split(key), 16, config=config.model)}
    view = losses.look(params, params, batch, draws, config=config)
    expected = (1 - config.learn.sigreg_weight) * sum(
        term.weight(config) * term.loss(params, params, view, None, config=config)[0]
        for term in (reward.TERM, value.TERM)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_numbers_that_cannot_be_are_refused_at_once(refit, quality, run, tmp_path):
    options = ["pendulum", "--data", str(run), "--out", str(tmp_path / "out")]
    for words in ("--heads 1 --steps 3", "--heads -1", "--shortcut -5", ""):
        with pytest.raises(UsageError, match=r"must be|nothing to learn"):
            refit.main([*options, *words.split()])
    for words in (["--steps", "0"], ["--batches", "0"]):
        with pytest.raises(UsageError, match=r"must be|should be"):
            quality.main(["pendulum", "--data", str(run), *words])


def test_other_episodes_than_the_agents_are_refused(refit, run):
    with pytest.raises(UsageError, match="holds no episodes of mountaincar"):
        refit.evidence.encoded(Agent.load("mountaincar"), [run], lambda numbers: numbers)


def test_an_outcome_is_what_came_and_the_value_of_its_end(quality, replay):
    agent = Agent.load("pendulum")
    config, params = agent.config, agent.params
    batch = replay.gather(replay.draw(np.random.default_rng(0), 3))
    horizon, chunk, discount = config.model.horizon, config.model.chunk, config.learn.discount
    found = quality.outcomes(params, batch, config=config)
    for row in range(3):
        received = batch.rewards[row, :horizon].reshape(-1) * config.learn.reward_scale
        end = model.value(params, batch.observations.vector[row, horizon], config=config)
        expected = received @ discount ** np.arange(horizon * chunk)
        expected += discount ** (horizon * chunk) * float(end)
        np.testing.assert_allclose(found[row], expected, rtol=1e-4)


def test_scores_start_from_nothing_then_from_draws_and_their_negatives(quality, replay):
    agent = Agent.load("pendulum")
    config, params = agent.config.graph, agent.params
    batch = replay.gather(replay.draw(np.random.default_rng(0), 3))
    z, _, actions = quality.evidence.segments(batch, config)
    key = jax.random.key(5)
    found = quality.scores(params, z, actions, key, config=config, steps=2)
    noise = draw_futures(key, 3, 8, (config.model.horizon, config.model.latent_dim))
    for index, starts in ((0, 0 * noise[::8]), (1, noise[::8]), (2, -noise[::8])):
        expected = predicted_return(params, z, actions, starts, config=config, steps=2)
        np.testing.assert_allclose(found[index], expected, rtol=1e-4, atol=1e-4)


def test_the_quality_of_scores_is_printed_for_all_steps(quality, run, tmp_path, capsys):
    path = tmp_path / "quality.json"
    options = ["--steps", "1", "2", "--batches", "2", "--batch-size", "64", "--json", str(path)]
    quality.main(["pendulum", "--data", str(run), *options])
    rows = json.loads(path.read_text(), parse_constant=pytest.fail)["rows"]
    assert [row["steps"] for row in rows] == [1, 2]
    for row in rows:
        assert {-1 <= row[way]["correlation"]["mean"] <= 1 for way in quality.WAYS} == {True}
        assert row["8 futures"]["error"]["mean"] <= row["1 future"]["error"]["mean"]
    assert capsys.readouterr().out.count("\n| 2 | ") == 2
    with pytest.raises(UsageError, match="has no diffusion steps"):
        quality.main(["lunarlander", "--data", str(run)])
