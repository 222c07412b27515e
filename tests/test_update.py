import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import CONFIG

from valdi_jax.config import Config
from valdi_jax.losses import before_end, draw, objective
from valdi_jax.losses.value import td_targets
from valdi_jax.model import encode, parameter_count
from valdi_jax.observation import Observation
from valdi_jax.types import Batch
from valdi_jax.updates import _jitted_update, init_state, observe, update

EXAMPLE = Observation(vector=np.zeros(2, np.float32))


def configured(dynamics="diffusion", **learn) -> Config:
    return dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, dynamics=dynamics),
        learn=dataclasses.replace(CONFIG.learn, **learn),
    )


def random_batch(seed=0, size=8):
    rng = np.random.default_rng(seed)
    return Batch(
        observations=Observation(vector=rng.standard_normal((size, 7, 2)).astype(np.float32)),
        actions=rng.uniform(-1, 1, (size, 6, 9)).astype(np.float32),
        rewards=rng.standard_normal((size, 6, 3)).astype(np.float32),
        terminals=np.zeros((size, 6), np.float32),
    )


def test_td_targets_by_hand():
    rewards = jnp.array([[1.0, 2.0, 4.0], [0.0, 0.0, 8.0]])
    values, terminals = jnp.array([10.0, 20.0]), jnp.array([0.0, 1.0])
    targets = td_targets(rewards, values, terminals, discount=0.5)
    np.testing.assert_allclose(targets, [1 + 1 + 1 + 10 / 8, 2.0])


def test_td_lambda_targets_by_hand():
    rewards = jnp.array([[1.0], [2.0], [4.0]])
    values, none = jnp.array([10.0, 20.0, 40.0]), jnp.zeros(3)
    last = 4 + 0.5 * 40
    middle = 2 + 0.5 * (0.75 * 20 + 0.25 * last)
    first = 1 + 0.5 * (0.75 * 10 + 0.25 * middle)
    targets = td_targets(rewards, values, none, discount=0.5, td_lambda=0.25)
    np.testing.assert_allclose(targets, [first, middle, last])
    one_step = td_targets(rewards, values, none, discount=0.5)
    np.testing.assert_allclose(
        td_targets(rewards, values, none, discount=0.5, td_lambda=1e-9), one_step, rtol=1e-6
    )
    # Chunks after a terminal one do not count.
    ended = td_targets(rewards, values, jnp.array([0.0, 1.0, 0.0]), discount=0.5, td_lambda=1.0)
    np.testing.assert_allclose(ended[:2], [1 + 0.5 * 2, 2])


def test_the_objective_uses_its_lambda():
    plain, longer = (configured(td_lambda=value) for value in (0.0, 0.7))
    state = init_state(jax.random.key(0), EXAMPLE, config=plain)
    draws = draw(jax.random.key(1), 8, config=plain)
    metrics = [
        objective(state.params, state.ema_params, random_batch(), draws, config=config)[1]
        for config in (plain, longer)
    ]
    assert abs(float(metrics[0]["value/target_mean"] - metrics[1]["value/target_mean"])) > 1e-3
    assert metrics[0]["loss/reward"] == metrics[1]["loss/reward"]


@pytest.mark.parametrize("dynamics", ["diffusion", "mlp"])
def test_learning_on_one_batch_lowers_what_it_regresses(dynamics):
    config = configured(dynamics, learning_rate=1e-3)
    state = init_state(jax.random.key(0), EXAMPLE, config=config)
    history = []
    for _ in range(150):
        state, metrics = update(state, random_batch(), config=config)
        history.append({name: float(value) for name, value in metrics.items()})
    for name in ("loss/total", "loss/dynamics", "loss/reward"):
        first, last = (np.mean([h[name] for h in part]) for part in (history[:10], history[-10:]))
        assert last < 0.8 * first, f"{name}: {first:.3f} -> {last:.3f}"


def test_one_compilation_serves_a_run_and_fields_outside_the_graph():
    config = configured(learning_rate=2e-3)
    before = _jitted_update._cache_size()
    state = init_state(jax.random.key(0), EXAMPLE, config=config)
    for seed in range(4):
        config = dataclasses.replace(config, seed=seed).replace(learn={"nonfinite_limit": 1 + seed})
        state, _ = update(state, random_batch(seed), config=config)
    assert _jitted_update._cache_size() == before + 1


def test_the_state_is_donated():
    config = configured()
    state = init_state(jax.random.key(0), EXAMPLE, config=config)
    update(state, random_batch(), config=config)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_the_metrics_name_every_term():
    config = configured()
    state = init_state(jax.random.key(0), EXAMPLE, config=config)
    _, metrics = update(state, random_batch(), config=config)
    assert {
        "loss/total",
        "loss/dynamics",
        "loss/reward",
        "loss/value",
        "loss/sigreg",
        "grad/norm",
        "value/mean",
        "latent/std",
    } <= set(metrics)
    weights = config.learn
    expected = (1 - weights.sigreg_weight) * (
        metrics["loss/dynamics"] + 0.01 * metrics["loss/reward"] + 0.01 * metrics["loss/value"]
    ) + weights.sigreg_weight * metrics["loss/sigreg"]
    assert float(metrics["loss/total"]) == pytest.approx(float(expected), rel=1e-5)


def test_the_ema_follows_at_its_rate():
    config = configured(ema_rate=0.25)
    state = init_state(jax.random.key(0), EXAMPLE, config=config)
    old = jax.tree.map(np.asarray, state.ema_params)
    state, _ = update(state, random_batch(), config=config)
    expected = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * np.asarray(p), old, state.params)
    jax.tree.map(
        lambda e, x: np.testing.assert_allclose(e, x, atol=1e-6), state.ema_params, expected
    )


def test_an_agent_acts_with_the_average_over_a_share_of_its_updates():
    config = configured(average=0.5)
    state = init_state(jax.random.key(0), EXAMPLE, config=config)
    seen = []
    for _ in range(3):
        state, _ = update(state, random_batch(), config=config)
        seen.append(np.asarray(jax.tree.leaves(state.params)[0]))
    # The update after n others has the weight 1 / (1 + n / 2).
    expected = (seen[0] / 3 + seen[1] * 2 / 3) / 2 + seen[2] / 2
    np.testing.assert_allclose(jax.tree.leaves(state.acting)[0], expected, atol=1e-6)
    assert np.abs(seen[2] - expected).max() > 1e-5


@pytest.mark.parametrize("dynamics", ["diffusion", "mlp"])
@pytest.mark.parametrize("td_encoder", ["online", "ema"])
def test_no_gradient_reaches_the_targets(dynamics, td_encoder):
    config = configured(dynamics, td_encoder=td_encoder)
    state = init_state(jax.random.key(0), EXAMPLE, config=config)
    draws = draw(jax.random.key(1), 8, config=config)
    batch = random_batch()
    gradient_of = jax.grad(lambda ema: objective(state.params, ema, batch, draws, config=config)[0])
    ema_grads = jax.jit(gradient_of)(state.ema_params)
    assert all(not np.any(g) for g in jax.tree.leaves(ema_grads))


@functools.partial(jax.jit, static_argnames="config")
def gradient(state, batch, draws, *, config):
    """Of the objective; op by op, hundreds of programs would compile."""

    def loss(params):
        return objective(params, state.ema_params, batch, draws, config=config)[0]

    return jax.grad(loss)(state.params)


@pytest.mark.parametrize("td_encoder", ["online", "ema"])
def test_observations_after_the_first_do_not_train_the_encoder(td_encoder):
    config = configured(td_encoder=td_encoder)
    state = init_state(jax.random.key(0), EXAMPLE, config=config)
    draws = draw(jax.random.key(1), 8, config=config)
    # A first observation of zeros gives the first layer's kernel no gradient.
    vector = random_batch().observations.vector.copy()
    vector[:, 0] = 0
    batch = random_batch().replace(observations=Observation(vector=vector))
    grads = gradient(state, batch, draws, config=config)
    layer = grads["encoder"]["vector_embedding"]["linear_0"]["dense"]
    assert not np.any(layer["kernel"])
    assert np.any(layer["bias"])


def test_the_encoder_is_trained_through_the_first_observation():
    config = configured()
    state = init_state(jax.random.key(0), EXAMPLE, config=config)
    draws = draw(jax.random.key(1), 8, config=config)
    grads = gradient(state, random_batch(), draws, config=config)
    assert all(np.any(g) for g in jax.tree.leaves(grads["encoder"]))
    assert all(np.any(g) for g in jax.tree.leaves(grads["value"]))


def test_terminal_steps_matter_only_where_the_bootstrap_is_cut():
    batch = random_batch()
    ended = batch.replace(terminals=np.ones_like(batch.terminals))
    for bootstrap in (True, False):
        config = configured(bootstrap_terminal=bootstrap)
        state = init_state(jax.random.key(0), EXAMPLE, config=config)
        draws = draw(jax.random.key(1), 8, config=config)
        losses = [
            float(objective(state.params, state.ema_params, b, draws, config=config)[0])
            for b in (batch, ended)
        ]
        assert (losses[0] == losses[1]) == bootstrap


def test_the_chunk_with_the_terminal_step_is_the_last_before_the_end():
    terminals = jnp.array([[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    valid = [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    np.testing.assert_array_equal(before_end(terminals), valid)


@pytest.mark.parametrize("dynamics", ["diffusion", "mlp"])
@pytest.mark.parametrize("td_encoder", ["online", "ema"])
def test_nothing_beyond_an_episodes_end_is_learnt(dynamics, td_encoder):
    config = configured(dynamics, bootstrap_terminal=False, td_encoder=td_encoder)
    state = init_state(jax.random.key(0), EXAMPLE, config=config)
    draws = draw(jax.random.key(1), 8, config=config)
    batch, other = random_batch(0), random_batch(1)
    batch.terminals[:, 2] = 1

    def beyond(ours, theirs, first):
        return np.concatenate([ours[:, :first], theirs[:, first:]], axis=1)

    # Chunk 2 leads to observation 3, the terminal one. The actions stay: the dynamics sees them all
    # at once, though it learns from none beyond the end.
    changed = batch.replace(
        observations=Observation(
            vector=beyond(batch.observations.vector, other.observations.vector, 4)
        ),
        rewards=beyond(batch.rewards, other.rewards, 3),
    )
    if dynamics == "diffusion":  # later latents are noised and seen, but never regressed
        changed = batch.replace(rewards=changed.rewards)
    chex.assert_trees_all_close(
        gradient(state, changed, draws, config=config),
        gradient(state, batch, draws, config=config),
        atol=1e-7,
    )
    earlier = batch.replace(rewards=beyond(batch.rewards, other.rewards, 2))
    assert any(
        np.any(a != b)
        for a, b in zip(
            jax.tree.leaves(gradient(state, earlier, draws, config=config)),
            jax.tree.leaves(gradient(state, batch, draws, config=config)),
            strict=True,
        )
    )


def test_the_reward_scale_scales_what_is_learnt():
    draws = draw(jax.random.key(1), 8, config=CONFIG)
    batch = random_batch()
    state = init_state(jax.random.key(0), EXAMPLE, config=CONFIG)
    losses = [
        float(objective(state.params, state.ema_params, b, draws, config=c)[0])
        for b, c in (
            (batch.replace(rewards=3 * batch.rewards), CONFIG),
            (batch, configured(reward_scale=3.0)),
        )
    ]
    assert losses[0] == pytest.approx(losses[1])
    assert losses[0] != pytest.approx(
        float(objective(state.params, state.ema_params, batch, draws, config=CONFIG)[0])
    )


def test_observations_are_normalised_by_their_running_statistics():
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, normalize=True))
    state = init_state(jax.random.key(0), EXAMPLE, config=config)
    plain = init_state(jax.random.key(0), EXAMPLE, config=CONFIG)
    assert "normalizer" not in plain.params
    assert parameter_count(state.params) == parameter_count(plain.params)

    vectors = np.random.default_rng(0).normal([5, -100], [2, 0.1], (1000, 2)).astype(np.float32)
    fresh = encode(state.params, Observation(vector=vectors), config=config)
    np.testing.assert_array_equal(
        fresh, encode(plain.params, Observation(vector=np.clip(vectors, -10, 10)), config=CONFIG)
    )
    for part in np.split(vectors, [1, 400]):
        state = observe(state, part)
    standard = (vectors - vectors.mean(axis=0)) / vectors.std(axis=0)
    for params in (state.params, state.ema_params):
        np.testing.assert_allclose(
            encode(params, Observation(vector=vectors), config=config),
            encode(plain.params, Observation(vector=standard), config=CONFIG),
            atol=2e-3,
        )
    assert observe(plain, vectors) is plain


def test_no_update_changes_the_normaliser():
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, normalize=True))
    state = init_state(jax.random.key(0), EXAMPLE, config=config)
    state = observe(state, np.random.default_rng(0).normal(3, 2, (50, 2)))
    before = jax.tree.map(np.array, state.params["normalizer"])
    for _ in range(3):
        state, _ = update(state, random_batch(), config=config)
    chex.assert_trees_all_equal(state.params["normalizer"], before)
    chex.assert_trees_all_close(state.ema_params["normalizer"], before, rtol=1e-6)


@pytest.mark.parametrize("field", ["actions", "rewards", "observations"])
def test_a_non_finite_update_changes_nothing(field):
    state = init_state(jax.random.key(0), EXAMPLE, config=CONFIG)
    state, metrics = update(state, random_batch(), config=CONFIG)
    assert metrics["update/refused"] == 0
    before = jax.tree.map(np.array, (state.params, state.ema_params, state.optimizer))
    batch = random_batch()
    array = batch.observations.vector if field == "observations" else getattr(batch, field)
    array[3, 1] = np.nan
    state, metrics = update(state, batch, config=CONFIG)
    assert metrics["update/refused"] == 1
    chex.assert_trees_all_equal((state.params, state.ema_params, state.optimizer), before)
    assert int(state.step) == 2
    state, metrics = update(state, random_batch(), config=CONFIG)
    assert metrics["update/refused"] == 0
    assert np.isfinite(metrics["loss/total"])


def test_updates_differ_from_one_step_to_the_next_but_not_between_runs():
    config = configured(learning_rate=1e-12)
    losses = []
    for _ in range(2):
        state = init_state(jax.random.key(0), EXAMPLE, config=config)
        for _ in range(2):
            state, metrics = update(state, random_batch(), config=config)
            losses.append(float(metrics["loss/dynamics"]))
    assert losses[:2] == losses[2:]
    assert losses[0] != losses[1]
