"""Every term of the objective trains the networks that it names, and no others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_update import EXAMPLE, configured, random_batch

from valdi_jax import model
from valdi_jax.errors import UsageError
from valdi_jax.losses import TERMS, draw, evaluate, look, objective
from valdi_jax.losses.base import regression
from valdi_jax.updates import init_state

PLANS = ("plan", "plan_value")  # Diffuser's: see test_recorded
NEEDS = {"q": ("q", "policy"), "policy": ("policy",), "energy": ("energy", "policy")}
NEEDS |= {"prior": ("prior",)}


def gradients(config):
    state = init_state(jax.random.key(0), EXAMPLE, config=config)
    draws = draw(jax.random.key(1), 8, config=config)
    # Some networks start at zero, and would pass no gradient on.
    params = jax.tree.map(lambda x: x + 0.01, state.params)
    name, *_ = config.learn.terms

    def loss(params):
        if TERMS[name].after:
            view = look(params, state.ema_params, random_batch(), draws, config=config)
            return evaluate(name, params, state.ema_params, view, draws, config=config)[0]
        return objective(params, state.ema_params, random_batch(), draws, config=config)[0]

    return jax.jit(jax.grad(loss))(params)  # op by op, hundreds of programs would compile


@pytest.mark.parametrize(
    ("name", "dynamics"),
    [
        (name, dynamics)
        for name in TERMS
        if name not in PLANS
        for dynamics in (("diffusion", "mlp") if name in NEEDS else ("diffusion", "flow", "mlp"))
    ],
)
def test_a_term_trains_what_it_names_and_nothing_else(name, dynamics):
    config = configured(dynamics, terms=(name,))
    if name in NEEDS:
        config = config.replace(model={"networks": NEEDS[name]})
    for network, tree in gradients(config).items():
        moved = any(np.any(leaf) for leaf in jax.tree.leaves(tree))
        assert moved == (network in TERMS[name].trains), network


def test_the_value_learns_as_a_distribution_too():
    config = configured("mlp", terms=("value",)).replace(model={"bins": 21})
    state = init_state(jax.random.key(0), EXAMPLE, config=config)
    z = jax.random.normal(jax.random.key(1), (64, config.model.latent_dim))
    np.testing.assert_allclose(model.values(state.params, z, config=config), 0, atol=1e-5)
    returns = 40 * jnp.tanh(z[:, 0])

    def loss(value):
        output = model.value_outputs({"value": value}, z, config=config)
        return regression(output, returns[None], config=config.model).mean()

    optimizer = optax.adam(1e-2)

    @jax.jit
    def fit(value):
        def step(carry, _):
            value, moments = carry
            change, moments = optimizer.update(jax.grad(loss)(value), moments)
            return (optax.apply_updates(value, change), moments), None

        return jax.lax.scan(step, (value, optimizer.init(value)), length=300)[0][0]

    fitted = model.values({"value": fit(state.params["value"])}, z, config=config)
    assert fitted.shape == (config.model.value_heads, 64)
    assert jnp.abs(fitted - returns[None]).mean() < 4  # of up to 40
    moved = gradients(config)
    assert all(any(np.any(x) for x in jax.tree.leaves(moved[n])) for n in TERMS["value"].trains)


def test_a_term_that_does_not_train_the_encoder_sees_latents_without_gradient(monkeypatch):
    reward = TERMS["reward"]._replace(trains=("reward",))
    monkeypatch.setitem(TERMS, "reward", reward)
    for network, tree in gradients(configured(terms=("reward",))).items():
        moved = any(np.any(leaf) for leaf in jax.tree.leaves(tree))
        assert moved == (network == "reward"), network


@pytest.mark.parametrize("answer", [jnp.zeros(()), (jnp.zeros(3), {}), (jnp.zeros(()),)])
def test_a_term_that_returns_something_else_is_named(monkeypatch, answer):
    term = TERMS["reward"]._replace(loss=lambda *_, config: answer)
    monkeypatch.setitem(TERMS, "reward", term)
    with pytest.raises(UsageError, match=r"terms reward: its loss has to return"):
        gradients(configured())


def test_the_order_of_terms_changes_no_draw():
    plain = draw(jax.random.key(0), 4, config=configured())
    turned = draw(
        jax.random.key(0), 4, config=configured(terms=("value", "sigreg", "dynamics", "reward"))
    )
    jax.tree.map(np.testing.assert_array_equal, plain, turned)
