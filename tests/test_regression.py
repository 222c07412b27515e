import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_update import EXAMPLE, configured, random_batch

from valdi_jax import init_params, model, regression
from valdi_jax.update import init_state, update

TWO_HOT = dataclasses.replace(
    configured(learning_rate=1e-3),
    model=dataclasses.replace(configured().model, head_kind="two-hot"),
)


def test_a_two_hot_target_has_the_number_for_its_mean_and_at_most_two_bins():
    numbers = np.array([0, 0.05, 0.3, -0.3, 7.7, -100, 800], np.float32)
    weights = regression.two_hot(numbers)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(weights @ regression.BINS, numbers, rtol=1e-5, atol=1e-6)
    for row in np.asarray(weights):
        (used,) = np.nonzero(row)
        assert len(used) <= 2
        assert np.ptp(used) <= 1


def test_what_lies_beyond_the_bins_falls_on_the_outermost():
    weights = np.asarray(regression.two_hot(np.array([-1e6, 1e6], np.float32)))
    assert weights[0].argmax() == 0
    assert weights[1].argmax() == len(regression.BINS) - 1
    np.testing.assert_allclose(weights.max(-1), 1)


@pytest.mark.parametrize("kind", ["scalar", "two-hot"])
def test_the_least_loss_is_at_the_mean_of_what_is_seen(kind):
    seen = jnp.array([-100.0, 0.0, 0.0, 1.0])  # a squashed target would not average to -24.75

    def total(outputs):
        repeated = jnp.broadcast_to(outputs, (4, *outputs.shape))
        return regression.loss(repeated, seen, kind=kind).mean()

    outputs = jnp.zeros(regression.output_size(kind))
    optimizer = optax.adam(0.3)
    state = optimizer.init(outputs)
    for _ in range(500):
        updates, state = optimizer.update(jax.grad(total)(outputs), state)
        outputs = optax.apply_updates(outputs, updates)
    assert regression.mean(outputs, kind=kind) == pytest.approx(-24.75, rel=0.02)


def test_untrained_two_hot_heads_say_nothing():
    params = init_params(jax.random.key(0), EXAMPLE, config=TWO_HOT)
    z = jax.random.normal(jax.random.key(1), (4, TWO_HOT.model.latent_dim))
    actions = jnp.ones((4, 9))
    np.testing.assert_allclose(model.reward(params, z, actions, config=TWO_HOT), 0, atol=1e-3)
    assert model.values(params, z, config=TWO_HOT).shape == (2, 4)
    np.testing.assert_allclose(model.value(params, z, config=TWO_HOT), 0, atol=1e-3)


@pytest.mark.parametrize("dynamics", ["diffusion", "mlp"])
def test_two_hot_heads_learn_from_updates(dynamics):
    config = TWO_HOT.replace(model={"dynamics": dynamics})
    state = init_state(jax.random.key(0), EXAMPLE, config=config)
    history = []
    for _ in range(150):
        state, metrics = update(state, random_batch(), config=config)
        history.append({name: float(metrics[name]) for name in ("loss/reward", "loss/value")})
    # The first updates have heads that say nothing: a uniform distribution over the bins.
    assert history[0]["loss/reward"] == pytest.approx(np.log(len(regression.BINS)), rel=0.01)
    for name in history[0]:
        first, last = (np.mean([h[name] for h in part]) for part in (history[:10], history[-10:]))
        assert last < 0.8 * first, f"{name}: {first:.3f} -> {last:.3f}"
