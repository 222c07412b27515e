"""How much of a score is luck: known cases, and the script."""

import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from valdi_jax import Agent
from valdi_jax.errors import UsageError
from valdi_jax.planners.scoring import predicted_return

MERIT = np.linspace(0, 19, 20)[:, None]  # of candidates, whose standard deviation is sqrt(35)


@pytest.fixture
def luck(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "experiments")
    return importlib.import_module("step_luck")


def test_scores_that_every_draw_repeats_are_no_luck(luck):
    scores = np.broadcast_to(MERIT, (20, 8))
    found = luck.spreads(scores, scores)
    assert found == pytest.approx({"luck": 0, "merit": 35**0.5, "share": 0, "left": 0})
    assert luck.choices(scores, scores) == {"top": 1, "optimism": 0, "regret": 0}


def test_scores_of_equal_candidates_are_all_luck(luck):
    own, shared, further = np.random.default_rng(0).normal(size=(3, 20, 2000))
    found = luck.spreads(own, shared)
    assert found["luck"] == pytest.approx(1, rel=0.02)
    assert found["left"] == pytest.approx(1, rel=0.02)
    assert found["share"] == pytest.approx(1, abs=0.01)
    chosen = luck.choices(own, further)
    assert chosen["top"] == pytest.approx(0.1, abs=0.03)  # 2 of 20, by chance
    assert chosen["optimism"] == pytest.approx(1.867, abs=0.08)  # the largest of 20 normal draws
    assert chosen["regret"] == pytest.approx(0, abs=0.1)


def test_sharing_a_draw_removes_the_luck_that_all_candidates_have_alike(luck):
    rng = np.random.default_rng(0)
    own = MERIT + 5 * rng.normal(size=(20, 2000))
    shared = MERIT + 5 * rng.normal(size=(1, 2000))
    found = luck.spreads(own, shared)
    assert found["luck"] == pytest.approx(5, rel=0.02)
    assert found["merit"] == pytest.approx(35**0.5, rel=0.02)
    assert found["share"] == pytest.approx(25 / 60, abs=0.02)
    assert found["left"] == pytest.approx(0, abs=1e-6)
    further = np.broadcast_to(MERIT, (20, 8))
    by_own, by_shared = luck.choices(own, further), luck.choices(shared, further)
    assert by_shared["top"] == 1
    assert by_shared["regret"] == 0
    assert by_shared["optimism"] == pytest.approx(0, abs=0.3)
    assert by_own["top"] < 0.8
    assert by_own["regret"] > 0.5
    assert by_own["optimism"] > 3


def test_the_winner_is_judged_by_further_draws(luck):
    scores = np.array([[1.0, 9.0], [2.0, 0.0]])  # the second candidate wins, then the first
    further = np.array([[4.0, 6.0, 3.0, 3.0], [1.0, 1.0, 7.0, 9.0]])
    # The first ranks higher (5 against 1) in one half; they are worth 3 and 8 in the other.
    found = luck.choices(scores, further)
    assert found == {"top": 0.5, "optimism": ((2 - 8) + (9 - 3)) / 2, "regret": ((3 - 8) + 0) / 2}


def test_candidates_share_a_draw_or_have_their_own_or_its_negative(luck):
    agent = Agent.load("pendulum")
    sizes = agent.config.model
    chunks = jnp.zeros((3, sizes.horizon, sizes.chunk * sizes.action_dim))
    z, keys = jnp.ones(sizes.latent_dim), jax.random.split(jax.random.key(0), 2)
    draws = luck.Draws(keys[jnp.array([0, 1, 0])], jnp.arange(3) == 1, jnp.array([1.0, 1, -1]))
    config = agent.config.graph
    scores = np.asarray(luck.score(agent.params, z, chunks, draws, config=config))
    assert scores.shape == (3, 3)
    assert np.ptp(scores[:, 1]) < 1e-3 < np.ptp(scores[:, 0])
    noise = jax.random.normal(keys[0], (3, sizes.horizon, sizes.latent_dim))
    steps = agent.config.planner.diffusion_steps
    for column, start in ((0, noise), (2, -noise)):
        given = predicted_return(agent.params, z, chunks, start, config=config, steps=steps)
        expected = given / config.learn.reward_scale
        np.testing.assert_allclose(scores[:, column], expected, rtol=1e-4, atol=1e-3)


def test_draws_come_with_their_negatives(luck):
    draws = luck.make_draws(jax.random.key(0), 2)
    keys = np.asarray(jax.random.key_data(draws.keys)).reshape(5, 2, -1)
    np.testing.assert_array_equal(keys[:2], keys[2:4])
    assert len(np.unique(keys[[0, 1, 4]].reshape(6, -1), axis=0)) == 6
    np.testing.assert_array_equal(draws.sign, [1, 1, 1, 1, -1, -1, -1, -1, 1, 1])
    np.testing.assert_array_equal(draws.shared, np.isin(np.arange(10) // 2, (1, 3, 4)))


def test_luck_is_written_for_both_populations_and_all_steps(luck, tmp_path, capsys):
    path = tmp_path / "luck.json"
    luck.main(["pendulum", "--quick", "--json", str(path)])
    data = json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN, Infinity
    assert data["command"].startswith("python experiments/step_luck.py pendulum --quick")
    rows = data["rows"]
    order = [("first", 1), ("first", 2), ("last", 1), ("last", 2)]
    assert [(row["population"], row["steps"]) for row in rows] == order
    for row in rows:
        assert row["spreads"]["luck"]["mean"] > row["spreads"]["left"]["mean"] > 0
        assert 0 < row["spreads"]["share"]["mean"] < 1
        assert {0 <= row[way]["top"]["mean"] <= 1 for way in luck.WAYS} == {True}
    assert rows[0]["spreads"] != rows[1]["spreads"]
    assert capsys.readouterr().out.count("\n| pendulum | last | 2 | ") == 4


def test_an_agent_without_steps_is_refused(luck):
    with pytest.raises(UsageError, match="carracing-mlp is no agent with diffusion steps"):
        luck.main(["carracing-mlp"])
