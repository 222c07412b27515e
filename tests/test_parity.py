"""Every number of the authors' implementation is reproduced (tests/parity/README.md)."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import PARITY

from valdi_jax import diffusion, dynamics, model
from valdi_jax.convert import parameter_names
from valdi_jax.losses import objective
from valdi_jax.planners.scoring import predicted_return
from valdi_jax.types import AgentState
from valdi_jax.updates import apply_update, make_optimizer


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def assert_close(ours, theirs, tolerance):
    """Largest error relative to the largest reference value."""
    error = np.max(np.abs(np.asarray(ours, np.float64) - theirs)) / np.max(np.abs(theirs))
    assert error < tolerance, f"relative error {error:.2e}"


def latents(parity, params):
    observations = parity.batch.observations
    return jax.jit(lambda p: model.encode(p, observations, config=parity.config))(params)


def test_parameter_counts_match_the_paper(parity):
    expected = {"diffusion": 5_390_230, "mlp": 5_795_363, "flow": 5_360_342}[
        parity.config.model.dynamics
    ]
    assert model.parameter_count(parity.params) == expected


def test_encoders(parity):
    assert_close(latents(parity, parity.params), parity["latent"], 1e-5)
    assert_close(latents(parity, parity.ema_params), parity["target_latent"], 1e-5)


def test_heads(parity):
    config, z = parity.config, jnp.asarray(parity["latent"])
    actions = parity["actions"]
    rewards = model.reward(parity.params, z[:, :6], actions, config=config)
    assert_close(rewards, parity["reward_pred"], 1e-5)
    values = model.values(parity.params, z, config=config)
    assert_close(values[0], parity["value_1"], 1e-5)
    assert_close(values[1], parity["value_2"], 1e-5)


def test_imagination(parity):
    config, z = parity.config, jnp.asarray(parity["latent"][:, 0])
    actions, params = parity["actions"][:, :5], parity.params["dynamics"]
    kind = config.model.dynamics
    if kind == "mlp":
        ours = dynamics.mlp.rollout(params, z, actions, config=config.model)
        assert_close(ours, parity["rollout"][:, 1:], 1e-5)
        return
    module, time, sampler = {
        "diffusion": (dynamics.diffusion, "step", "ddim"),
        "flow": (dynamics.flow, "time", "euler"),
    }[kind]
    ours = module.velocity(params, z, actions, parity["noisy"], parity[time], config=config.model)
    assert_close(ours, parity["velocity"], 1e-5)
    for steps in (1, 2, 3, 4, 8, 50):
        ours = model.imagine(
            params, z, actions, parity["start_noise"], config=config.model, steps=steps
        )
        assert_close(ours, parity[f"{sampler}_{steps}"], 1e-5)


def test_times_of_the_flow():
    flow = dynamics.flow
    with np.load(PARITY / "official_flow.npz", allow_pickle=False) as numbers:
        np.testing.assert_array_equal(flow.frequencies(16), numbers["time_frequencies"])
        features = flow.time_features(jnp.asarray(numbers["time"]), 32)
        assert_close(features, numbers["time_features"], 1e-5)
        for steps in (1, 2, 3, 4, 8, 50):
            times = flow.euler_times(steps)
            np.testing.assert_array_equal(times[:-1], numbers[f"euler_times_{steps}"])
            assert times[-1] == 1


def test_noise_schedule():
    with np.load(PARITY / "official_diffusion.npz", allow_pickle=False) as numbers:
        assert_close(diffusion.alpha_bars(1000), numbers["alphas_cumprod"], 1e-5)


def test_the_trajectory_that_the_heads_are_trained_on(parity):
    z = jnp.asarray(parity["latent"][:, 0])
    _, predicted = dynamics.DYNAMICS[parity.config.model.dynamics].predict(
        parity.params["dynamics"],
        z,
        parity["actions"][:, :5],
        jnp.asarray(parity["target_latent"][:, 1:6]),
        jnp.ones((4, 5)),
        parity.draws["dynamics"],
        config=parity.config.model,
    )
    assert_close(np.concatenate([z[:, None], predicted], axis=1), parity["trajectory"], 1e-5)


def test_planner_score(parity):
    ours = predicted_return(
        parity.params,
        jnp.asarray(parity["latent"][:, 0]),
        parity["actions"][:, :5],
        parity["start_noise"],
        config=parity.config,
        steps=1,
    )
    assert_close(ours, parity["planner_return"], 1e-5)


def test_losses(parity):
    total, metrics = objective(
        parity.params, parity.ema_params, parity.batch, parity.draws, config=parity.config
    )
    assert_close(total, parity["loss_total"], 1e-5)
    assert_close(metrics["loss/dynamics"], parity["loss_diffusion"], 1e-5)
    for name in ("reward", "value", "sigreg"):
        assert_close(metrics[f"loss/{name}"], parity[f"loss_{name}"], 1e-5)


def test_gradients(parity):
    gradient = jax.jit(jax.grad(objective, has_aux=True), static_argnames="config")
    grads = gradient(
        parity.params, parity.ema_params, parity.batch, parity.draws, config=parity.config
    )[0]
    assert_close(optax.tree.norm(grads), parity["grad_global_norm"], 1e-4)
    norms = dict(zip(parity["grad_keys"], parity["grad_norms"], strict=True))
    dots = dict(zip(parity["grad_keys"], parity["grad_dots"], strict=True))
    names = parameter_names(parity.config)
    assert set(names.values()) == set(norms)
    for path, name in names.items():
        grad = grads
        for key in path:
            grad = grad[key]
        grad = np.asarray(grad, np.float64)
        if path[-1] == "kernel":
            grad = grad.transpose(3, 2, 0, 1) if grad.ndim == 4 else grad.T
        assert abs(np.linalg.norm(grad) - norms[name]) < 1e-4 * norms[name], name
        shape = grad.shape if "marker" not in name else (1, *grad.shape)
        probe = reference_tensor_probe(name, shape)
        # The dot product cancels, so its error is measured against the vectors' lengths.
        scale = norms[name] * np.linalg.norm(probe)
        assert abs(np.sum(grad.reshape(shape) * probe) - dots[name]) < 1e-4 * scale, name


def reference_tensor_probe(name, shape):
    return np.random.RandomState(zlib.crc32(f"public:probe:{name}".encode())).standard_normal(shape)


def test_five_updates(parity):
    config = parity.config
    state = AgentState(
        params=parity.params,
        ema_params=parity.ema_params,
        optimizer=make_optimizer(config).init(parity.params),
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key(0),
    )
    step = jax.jit(lambda state: apply_update(state, parity.batch, parity.draws, config=config))
    for expected in parity["update_history"]:
        state, metrics = step(state)
        ours = [metrics[f"loss/{name}"] for name in ("total", "dynamics", "sigreg", "reward")]
        np.testing.assert_allclose(ours, expected, rtol=1e-4)
    assert_close(latents(parity, state.params), parity["latent_after_5_updates"], 1e-4)
    assert_close(latents(parity, state.ema_params), parity["target_latent_after_5_updates"], 1e-4)
