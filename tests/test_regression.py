import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_update import EXAMPLE, configured, random_batch

from valdi_jax import init_params, model, plan, regression
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
    assert regression.decode(outputs, kind=kind) == pytest.approx(-24.75, rel=0.02)


def test_untrained_two_hot_heads_say_nothing():
    params = init_params(jax.random.key(0), EXAMPLE, config=TWO_HOT)
    z = jax.random.normal(jax.random.key(1), (4, TWO_HOT.model.latent_dim))
    actions = jnp.ones((4, 9))
    np.testing.assert_allclose(model.reward(params, z, actions, config=TWO_HOT), 0, atol=1e-3)
    assert model.values(params, z, config=TWO_HOT).shape == (2, 4)
    np.testing.assert_allclose(model.value(params, z, config=TWO_HOT), 0, atol=1e-3)


def test_the_value_is_the_least_of_what_two_hot_heads_decode_to():
    params = perturbed(init_params(jax.random.key(0), EXAMPLE, config=TWO_HOT))
    z = jax.random.normal(jax.random.key(1), (64, TWO_HOT.model.latent_dim))
    values = np.asarray(model.values(params, z, config=TWO_HOT))
    assert 0 < (values[0] < values[1]).mean() < 1  # either may be the least
    np.testing.assert_allclose(model.value(params, z, config=TWO_HOT), values.min(axis=0))


def perturbed(params):
    """Parameters moved at random, so that heads say something."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_plans_are_made_with_two_hot_heads(precision):
    config = TWO_HOT.replace(planner={"precision": precision})
    params = perturbed(init_params(jax.random.key(0), EXAMPLE, config=config))
    answer = plan(params, EXAMPLE, jax.random.key(1), config=config)
    assert np.isfinite(answer.predicted_return)
    assert answer.predicted_return != 0
    assert answer.actions.shape == config.plan_shape


def test_the_loss_of_a_batch_is_that_of_each_of_its_entries():
    outputs = jax.random.normal(jax.random.key(0), (2, 3, 4, len(regression.BINS)))
    targets = 50 * jax.random.normal(jax.random.key(1), (3, 4))
    losses = regression.loss(outputs, targets, kind="two-hot")
    assert losses.shape == (2, 3, 4)
    alone = regression.loss(outputs[1, 2, 3], targets[2, 3], kind="two-hot")
    np.testing.assert_allclose(losses[1, 2, 3], alone, rtol=1e-5)


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
