"""iCEM and MPPI, on problems with a known solution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from valdi_jax.config import PlannerConfig
from valdi_jax.planners import PLANNERS, icem, mppi
from valdi_jax.planners.base import Problem

SHAPE = (6, 2)
TARGET = jnp.linspace(-0.8, 0.8, 12).reshape(SHAPE)
CONFIG = PlannerConfig(candidates=64, elites=8, iterations=6, answer="mean")


SEARCHES = [kind for kind, planner in PLANNERS.items() if planner.plan is None]


def quadratic(target=TARGET, executed=2):
    def score(sequences, key):
        return -jnp.sum((sequences - target[None]) ** 2, axis=(1, 2))

    return Problem(SHAPE, executed, score)


def search(kind, problem, carry=None, seed=0, config=CONFIG):
    planner = PLANNERS[kind]
    carry = planner.init(SHAPE, config=config) if carry is None else carry
    run = jax.jit(lambda carry, key: planner.search(problem, carry, key, config=config))
    found, carry = run(carry, jax.random.key(seed))
    return planner.squash(found.sequence), found, carry


@pytest.mark.parametrize("kind", SEARCHES)
@pytest.mark.parametrize("answer", ["best", "mean"])
def test_a_planner_finds_the_top_of_a_hill(kind, answer):
    config = dataclasses.replace(CONFIG, answer=answer)
    actions, found, _ = search(kind, quadratic(), config=config)
    assert float(jnp.abs(actions - TARGET).mean()) < 0.25
    if answer == "best" and kind != "mbdpo":  # which always returns its mean
        expected = quadratic().score(actions[None], None)[0]
        np.testing.assert_allclose(found.score, expected, rtol=1e-5)
    else:
        assert found.score is None


@pytest.mark.parametrize("kind", SEARCHES)
def test_a_planner_stays_within_bounds_and_survives_nan_scores(kind):
    far = quadratic(jnp.full(SHAPE, 5.0))
    actions, _, carry = search(kind, far)
    assert float(actions.mean()) > 0.5
    assert float(actions.max()) <= 1

    def broken(sequences, key):
        return jnp.where(sequences[:, 0, 0] > 0, jnp.nan, far.score(sequences, key))

    actions, found, carry = search(kind, far._replace(score=broken))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((actions, found.mean, carry)))
    nothing = far._replace(score=lambda sequences, key: jnp.full(len(sequences), jnp.nan))
    actions, found, carry = search(kind, nothing)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((actions, found.mean, carry)))


@pytest.mark.parametrize("kind", ["icem", "mppi"])
def test_a_search_starts_where_the_last_one_ended(kind):
    problem = quadratic()
    _, _, carry = search(kind, problem)
    mean = carry if kind == "mppi" else carry.mean
    assert float(jnp.abs(mean[:4] - TARGET[2:]).mean()) < 0.3
    np.testing.assert_array_equal(mean[4:], 0)
    # The next problem is the same, shifted: a single iteration benefits from the carry.
    moved = quadratic(jnp.concatenate([TARGET[2:], jnp.zeros((2, 2))]))
    once = dataclasses.replace(CONFIG, iterations=1)
    errors = {"cold": [], "warm": []}
    for seed in range(20):
        for name, start in (("cold", None), ("warm", carry)):
            _, found, _ = search(kind, moved, start, seed, once)
            errors[name].append(float(-moved.score(found.mean[None], None)[0]))
    assert np.mean(errors["warm"]) < 0.9 * np.mean(errors["cold"])


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("steps", [1, 2, 5, 15])
def test_coloured_noise_has_unit_variance_and_the_requested_spectrum(exponent, steps):
    noise = icem.colored_normal(jax.random.key(0), (4000, steps, 2), exponent=exponent)
    np.testing.assert_allclose(noise.std(axis=0), 1, atol=0.06)
    if steps < 5:
        return
    power = np.mean(np.abs(np.fft.rfft(noise, axis=1)) ** 2, axis=(0, 2))
    waves = np.arange(1, (steps + 1) // 2)  # neither the mean nor the alternating one
    slope = np.polyfit(np.log(waves), np.log(power[waves]), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.15)


def test_icems_population_decays_to_twice_its_elites():
    config = dataclasses.replace(CONFIG, candidates=100, elites=10)
    assert [icem.population(i, config) for i in range(5)] == [100, 80, 64, 51, 40]
    assert icem.population(30, config) == 20
    assert icem.population(30, dataclasses.replace(config, elites=80)) == 100


def test_icem_scores_its_mean_and_the_elites_that_it_kept():
    asked = []

    def recording(sequences, key):
        jax.debug.callback(lambda x: asked.append(np.array(x)), sequences)
        return quadratic().score(sequences, key)

    config = dataclasses.replace(CONFIG, candidates=40, elites=10, iterations=2)
    planner = PLANNERS["icem"]
    problem = Problem(SHAPE, 2, recording)
    carry = planner.init(SHAPE, config=config)
    _, carry = planner.search(problem, carry, jax.random.key(0), config=config)
    first, second = asked
    assert (len(first), len(second)) == (43, 35)  # each includes three kept elites
    scores = np.array(quadratic().score(jnp.array(first[:40]), None))
    best = first[np.argsort(-scores)]
    np.testing.assert_array_equal(second[-3:], best[:3])
    np.testing.assert_allclose(second[0], 0.9 * best[:10].mean(axis=0), atol=1e-6)
    asked.clear()
    planner.search(problem, carry, jax.random.key(1), config=config)
    np.testing.assert_array_equal(asked[0][-3:], carry.elites)


def test_mppi_weights_elites_by_a_softmax_and_bounds_the_deviation():
    settings = dataclasses.replace(CONFIG.mppi, temperature=2.0, min_std=0.3, max_std=0.6)
    config = dataclasses.replace(CONFIG, iterations=1, candidates=64, elites=3, mppi=settings)
    key = jax.random.key(0)
    _, found, _ = search("mppi", quadratic(), config=config)
    sample_key = jax.random.split(jax.random.split(key, 1)[0])[0]
    samples = np.clip(0.6 * jax.random.normal(sample_key, (64, *SHAPE)), -1, 1)
    scores = np.array(quadratic().score(jnp.array(samples), None))
    elite = np.argsort(-scores)[:3]
    weights = np.exp(2.0 * (scores[elite] - scores[elite[0]]))
    weights /= weights.sum()
    mean = np.einsum("k,ksa->sa", weights, samples[elite])
    std = np.sqrt(np.einsum("k,ksa->sa", weights, (samples[elite] - mean) ** 2))
    np.testing.assert_allclose(found.mean, mean, atol=1e-5)
    np.testing.assert_allclose(found.std, np.clip(std, 0.3, 0.6), atol=1e-5)


def test_mppi_starts_at_its_maximum_deviation():
    assert not np.any(mppi.init(SHAPE, config=CONFIG))
