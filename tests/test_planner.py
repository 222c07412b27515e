import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from valdi_jax import model, planners
from valdi_jax.config import validate
from valdi_jax.data.rollout import first_carries, plan_batch
from valdi_jax.errors import UsageError
from valdi_jax.model import init_params
from valdi_jax.observation import Observation
from valdi_jax.planners import cem as cem_module
from valdi_jax.planners import plan
from valdi_jax.planners.base import correlated_normal
from valdi_jax.planners.cem import cem
from valdi_jax.planners.scoring import predicted_return
from valdi_jax.presets import PRESETS

OPTIMUM = jnp.array([[0.5, -1.0], [2.0, 0.0], [-0.3, 0.7]])


def quadratic(candidates, key):
    return -jnp.sum((candidates - OPTIMUM[None]) ** 2, axis=(1, 2))


def search(score=quadratic, seed=0, **settings):
    settings = {"candidates": 256, "elites": 32, "iterations": 12} | settings
    shape = OPTIMUM.shape
    return cem(score, jnp.zeros(shape), jnp.ones(shape), jax.random.key(seed), **settings)


def test_candidates_without_a_score_are_never_chosen():
    def score(samples, key):
        return jnp.where(samples > 0, jnp.nan, -((samples + 1) ** 2))

    found = cem(
        score,
        jnp.zeros(()),
        jnp.ones(()),
        jax.random.key(0),
        candidates=64,
        elites=8,
        iterations=10,
    )
    assert float(found.best) == pytest.approx(-1, abs=0.05)
    assert float(found.mean) == pytest.approx(-1, abs=0.1)


def test_cem_finds_the_optimum_of_a_quadratic():
    found = search()
    np.testing.assert_allclose(found.mean, OPTIMUM, atol=0.02)
    np.testing.assert_allclose(found.best, OPTIMUM, atol=0.1)
    assert np.all(found.std < 0.05)


def test_cem_returns_the_best_candidate_of_all_iterations():
    seen = []

    def noisy(candidates, key):
        # Noise dominates the score, so the best is as likely early as late.
        scores = 100 * jax.random.normal(key, candidates.shape[:1])
        jax.debug.callback(lambda *x: seen.append(x), candidates, scores)
        return scores

    found = search(noisy, iterations=6)
    jax.effects_barrier()
    candidates, scores = (np.concatenate(x) for x in zip(*seen, strict=True))
    assert len(scores) == 6 * 256
    assert float(found.best_score) == scores.max()
    np.testing.assert_array_equal(found.best, candidates[scores.argmax()])
    assert scores.argmax() < 5 * 256, "choose another seed: the last iteration had the best"


def test_cem_uses_the_sample_standard_deviation():
    found = search(iterations=1)
    samples = jax.random.normal(
        jax.random.split(jax.random.split(jax.random.key(0), 1)[0])[0], (256, *OPTIMUM.shape)
    )
    elite = samples[np.argsort(-np.asarray(quadratic(samples, None)))[:32]]
    np.testing.assert_allclose(found.mean, elite.mean(0), atol=1e-5)
    np.testing.assert_allclose(found.std, elite.std(0, ddof=1) + 1e-6, atol=1e-5)


@pytest.mark.parametrize("elites", [1, 257])
def test_cem_refuses_impossible_elites(elites):
    with pytest.raises(ValueError, match="between 2 and candidates"):
        search(elites=elites)


@pytest.fixture(scope="module", params=["diffusion", "mlp"])
def agent(request):
    tiny = PRESETS["tiny"]
    config = dataclasses.replace(
        tiny, model=dataclasses.replace(tiny.model, dynamics=request.param)
    )
    rng = np.random.default_rng(0)
    observations = Observation(
        image=rng.integers(0, 256, (4, 96, 96, 3), np.uint8),
        vector=rng.standard_normal((4, 7)).astype(np.float32),
    )
    first = jax.tree.map(lambda x: x[0], observations)
    params = init_params(jax.random.key(0), first, config=config)
    return config, params, observations, first


def test_the_same_key_gives_the_same_plan(agent):
    config, params, _, first = agent
    one, two = (plan(params, first, jax.random.key(5), config=config) for _ in range(2))
    other = plan(params, first, jax.random.key(6), config=config)
    np.testing.assert_array_equal(one.actions, two.actions)
    assert not np.array_equal(one.actions, other.actions)


def test_a_batch_of_plans_equals_one_by_one(agent):
    config, params, observations, _ = agent
    keys = jax.random.split(jax.random.key(1), 4)
    batched = jax.vmap(lambda o, k: plan(params, o, k, config=config))(observations, keys)
    for i in range(4):
        single = plan(
            params, jax.tree.map(lambda x, i=i: x[i], observations), keys[i], config=config
        )
        np.testing.assert_allclose(batched.actions[i], single.actions, atol=1e-4)
        np.testing.assert_allclose(
            batched.predicted_return[i], single.predicted_return, rtol=1e-4, atol=1e-5
        )


def test_a_plan_has_an_action_for_every_environment_step(agent):
    config, params, _, first = agent
    answer = plan(params, first, jax.random.key(0), config=config)
    assert answer.actions.shape == answer.mean.shape == answer.std.shape == (15, 3)
    assert np.all(np.abs(answer.actions) <= 1)


def test_a_plan_in_bfloat16_equals_that_in_float32_up_to_rounding(agent):
    config, params, _, first = agent
    low = config.replace(planner={"precision": "bfloat16", "iterations": 1})
    one, two = (
        plan(params, first, jax.random.key(0), config=c)
        for c in (config.replace(planner={"iterations": 1}), low)
    )
    assert two.actions.dtype == two.predicted_return.dtype == np.float32
    assert float(one.predicted_return) != float(two.predicted_return)
    np.testing.assert_allclose(one.predicted_return, two.predicted_return, rtol=0.05, atol=0.02)
    text = str(jax.make_jaxpr(lambda: plan(params, first, jax.random.key(0), config=low))())
    assert "bf16" in text


def test_exploration_noise_is_added_before_tanh(agent):
    config, params, _, first = agent
    key = jax.random.key(2)
    calm = plan(params, first, key, config=config)
    noisy = plan(params, first, key, config=config, noise_std=0.25)
    step = np.arctanh(np.clip(noisy.actions, -0.999999, 0.999999)) - np.arctanh(
        np.clip(calm.actions, -0.999999, 0.999999)
    )
    assert 0.1 < step.std() < 0.4
    np.testing.assert_allclose(noisy.mean, calm.mean)


def test_actions_can_be_held(agent):
    config, params, _, first = agent
    config = config.replace(planner={"action_hold": 3})
    answer = plan(params, first, jax.random.key(0), config=config, noise_std=0.5)
    assert answer.actions.shape == answer.mean.shape == answer.std.shape == (15, 3)
    holds = np.asarray(answer.actions).reshape(5, 3, 3)
    np.testing.assert_array_equal(holds, np.repeat(holds[:, :1], 3, axis=1))
    assert np.all(np.abs(np.diff(holds[:, 0], axis=0)) > 0)


def test_noise_can_be_correlated_along_the_sequence():
    key, shape = jax.random.key(0), (20000, 4, 2)
    noise = np.asarray(correlated_normal(key, shape, correlation=0.8))
    np.testing.assert_allclose(noise.std(axis=0), 1, atol=0.03)
    for lag in (1, 2, 3):
        for start in range(4 - lag):
            found = np.mean(noise[:, start] * noise[:, start + lag])
            assert found == pytest.approx(0.8**lag, abs=0.03)
    assert np.abs(np.mean(noise[..., 0] * noise[..., 1])) < 0.02
    none = correlated_normal(key, shape, correlation=0.0)
    np.testing.assert_array_equal(none, jax.random.normal(key, shape))


def test_a_plan_uses_its_correlation(agent):
    config, params, _, first = agent
    config = config.replace(planner={"correlation": 1.0, "iterations": 1, "answer": "mean"})
    # Every candidate, and the exploration noise, is one action throughout.
    found = plan(params, first, jax.random.key(0), config=config, noise_std=0.5)
    for sequence in (found.mean, found.actions):
        np.testing.assert_allclose(sequence, sequence[:1].repeat(15, axis=0), atol=1e-6)


def test_a_search_starts_from_the_previous_plan(agent):
    config, params, _, first = agent
    config = config.replace(planner={"warm_start": True, "action_hold": 3})
    cold = plan(params, first, jax.random.key(0), config=config)
    assert cold.carry.shape == (5, 3)
    np.testing.assert_allclose(cold.carry[:4], np.clip(cold.mean[3::3], -1.5, 1.5))
    np.testing.assert_array_equal(cold.carry[4], 0)
    far = jnp.full((5, 3), 1.5)
    warm = plan(params, first, jax.random.key(0), config=config, carry=far)
    # Two refits around it, with standard deviation 1, do not return to zero.
    assert warm.mean.mean() > cold.mean.mean() + 0.5
    off = config.replace(planner={"warm_start": False})
    assert plan(params, first, jax.random.key(0), config=off).carry is None


def test_an_episode_starts_a_new_search(agent):
    config, params, observations, _ = agent
    config = config.replace(planner={"warm_start": True})
    keys = jax.random.split(jax.random.key(1), 4)
    decisions = np.array([0, 1, 0, 5], np.int32)

    def chunks(carries):
        return plan_batch(
            params, observations, keys, decisions, np.float32(0), carries, config=config
        ).actions

    fresh = first_carries(4, config)
    assert fresh.shape == (4, 15, 3)
    one, other = chunks(fresh), chunks(fresh + 1.5)
    same = [bool(np.array_equal(a, b)) for a, b in zip(one, other, strict=True)]
    assert same == [True, False, True, False]


def test_the_answer_can_be_the_elite_mean(agent):
    config, params, _, first = agent
    config = dataclasses.replace(config, planner=dataclasses.replace(config.planner, answer="mean"))
    answer = plan(params, first, jax.random.key(0), config=config)
    np.testing.assert_allclose(answer.actions, np.tanh(answer.mean), atol=1e-6)


def test_the_predicted_return_is_that_of_the_chosen_sequence(agent, monkeypatch):
    config, params, _, first = agent
    z = model.encode(params, first, config=config)
    noise = jnp.zeros((1, config.model.horizon, config.model.latent_dim))
    # With fixed initial noise, the score of a sequence can be recomputed.
    imagine = model.imagine
    monkeypatch.setattr(model, "imagine", lambda p, z, a, n, **kw: imagine(p, z, a, 0 * n, **kw))
    for answer in ("best", "mean"):
        settings = dataclasses.replace(config.planner, answer=answer)
        each = dataclasses.replace(config, planner=settings)
        found = planners._plan.__wrapped__(params, first, jax.random.key(0), 0.0, None, config=each)
        chunks = found.actions.reshape(1, config.model.horizon, -1)
        expected = predicted_return(params, z, chunks, noise, config=each, steps=1)
        np.testing.assert_allclose(found.predicted_return, expected[0], rtol=1e-4, atol=1e-5)


def test_shared_noise_gives_equal_candidates_equal_scores(monkeypatch):
    config = PRESETS["tiny"]
    first = Observation(vector=np.ones(7, np.float32))
    params = init_params(jax.random.key(0), first, config=config)
    spreads = {}
    for shared in (False, True):
        settings = dataclasses.replace(config.planner, shared_noise=shared)

        def same_candidates(score_fn, mean, std, key, shared=shared, **kwargs):
            scores = score_fn(jnp.ones((16, *mean.shape)), key)
            spreads[shared] = float(scores.std())
            return cem(score_fn, mean, std, key, **kwargs)

        monkeypatch.setattr(cem_module, "cem", same_candidates)
        each = dataclasses.replace(config, planner=settings)
        planners._plan.__wrapped__(params, first, jax.random.key(0), 0.0, None, config=each)
    assert spreads[True] < 1e-5 < spreads[False]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("futures", [1, 3])
def test_a_score_is_the_mean_over_futures(agent, monkeypatch, futures, shared):
    config, params, _, first = agent
    config = config.replace(planner={"futures": futures, "shared_noise": shared})
    sequences = jax.random.normal(jax.random.key(1), (4, *config.search_shape))
    score_key = jax.random.key(2)
    found = {}

    def score_once(score_fn, mean, std, key, **kwargs):
        found["scores"] = score_fn(sequences, score_key)
        return cem(score_fn, mean, std, key, **kwargs)

    monkeypatch.setattr(cem_module, "cem", score_once)
    planners._plan.__wrapped__(params, first, jax.random.key(0), 0.0, None, config=config)
    shape = config.model.horizon, config.model.latent_dim
    key, count = (jax.random.split(jax.random.key(0), 4)[1], 1) if shared else (score_key, 4)
    drawn = jax.random.normal(key, (count, 2, *shape) if futures == 3 else (count, 1, *shape))
    noise = drawn if futures == 1 else jnp.stack([drawn[:, 0], -drawn[:, 0], drawn[:, 1]], axis=1)
    noise = jnp.broadcast_to(noise, (4, futures, *shape))
    z = model.encode(params, first, config=config)
    chunks = jnp.tanh(sequences).reshape(4, config.model.horizon, -1)
    singles = [
        predicted_return(params, z, chunks, noise[:, i], config=config, steps=1)
        for i in range(futures)
    ]
    assert np.std(np.mean(singles, axis=0)) > 1e-3
    np.testing.assert_allclose(found["scores"], np.mean(singles, axis=0), rtol=1e-4, atol=1e-5)


def test_futures_are_for_searches():
    config = PRESETS["diffuser"].replace(planner={"futures": 2})
    with pytest.raises(UsageError, match=r"--planner.futures is 2; it is for searches"):
        validate(config)


def test_all_candidates_are_imagined_in_one_batched_call(agent, monkeypatch):
    config, params, _, first = agent
    shapes = []
    imagine = model.imagine

    def recording(params, z, actions, *args, **kwargs):
        shapes.append(actions.shape)
        return imagine(params, z, actions, *args, **kwargs)

    monkeypatch.setattr(model, "imagine", recording)
    jaxpr = jax.make_jaxpr(
        lambda o, k: planners._plan.__wrapped__(params, o, k, 0.0, None, config=config)
    )(first, jax.random.key(0))
    assert set(shapes) == {(config.planner.candidates, 5, 9)}
    assert str(jaxpr).count("top_k[") == 1, "the iterations were unrolled"
