import jax
import jax.numpy as jnp
import numpy as np
import pytest

from valdi_jax.losses.sigreg import random_directions, sigreg


def statistic(latents, count=512):
    directions = random_directions(jax.random.key(1), latents.shape[1], count)
    return float(sigreg(latents, directions, knots=17))


@pytest.mark.parametrize("batch", [64, 512])
def test_gaussian_latents_give_the_known_expectation(batch):
    draws = [jax.random.normal(jax.random.key(i), (batch, 16)) for i in range(20)]
    assert np.mean([statistic(x) for x in draws]) == pytest.approx(1.0525, rel=0.05)


def test_collapsed_latents_are_penalised_in_proportion_to_the_batch():
    assert statistic(jnp.zeros((32, 16))) == pytest.approx(0.40205 * 32, rel=1e-3)


def test_directions_are_unit_columns():
    directions = random_directions(jax.random.key(0), 16, 100)
    np.testing.assert_allclose(jnp.linalg.norm(directions, axis=0), 1, rtol=1e-5)


def test_a_direction_of_length_zero_gives_no_nan(monkeypatch):
    latents = jax.random.normal(jax.random.key(0), (8, 4))
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.zeros(shape))
    directions = random_directions(jax.random.key(0), 4, 3)
    assert np.isfinite(directions).all()
    gradient = jax.grad(lambda x: sigreg(x, directions, knots=17))(latents)
    assert np.isfinite(gradient).all()
