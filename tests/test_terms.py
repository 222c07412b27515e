"""Every term of the objective trains the networks that it names, and no others."""

import jax
import numpy as np
import pytest
from test_update import EXAMPLE, configured, random_batch

from valdi_jax.losses import TERMS, draw, evaluate, look, objective
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

    return jax.grad(loss)(params)


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


def test_a_term_that_does_not_train_the_encoder_sees_latents_without_gradient(monkeypatch):
    reward = TERMS["reward"]._replace(trains=("reward",))
    monkeypatch.setitem(TERMS, "reward", reward)
    for network, tree in gradients(configured(terms=("reward",))).items():
        moved = any(np.any(leaf) for leaf in jax.tree.leaves(tree))
        assert moved == (network == "reward"), network


def test_the_order_of_terms_changes_no_draw():
    plain = draw(jax.random.key(0), 4, config=configured())
    turned = draw(
        jax.random.key(0), 4, config=configured(terms=("value", "sigreg", "dynamics", "reward"))
    )
    jax.tree.map(np.testing.assert_array_equal, plain, turned)
