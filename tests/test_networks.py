import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from valdi_jax.dynamics import diffusion
from valdi_jax.model import encode, encode_targets, init_params, params_shapes
from valdi_jax.networks.layers import kernel_init, normal_init, uniform_init
from valdi_jax.observation import Observation
from valdi_jax.presets import PRESETS, default_config

SMALL = PRESETS["tiny"].model


def test_every_imagined_step_sees_the_whole_sequence():
    params = diffusion.init(jax.random.key(0), config=SMALL)
    keys = jax.random.split(jax.random.key(1), 3)
    z = jax.random.normal(keys[0], (SMALL.latent_dim,))
    actions = jax.random.normal(keys[1], (SMALL.horizon, 9))
    noised = jax.random.normal(keys[2], (SMALL.horizon, SMALL.latent_dim))

    def predict(z, actions, noised):
        return diffusion.velocity(params, z, actions, noised, jnp.int32(10), config=SMALL).sum(-1)

    for argument, jacobian in enumerate(jax.jacobian(predict, (0, 1, 2))(z, actions, noised)):
        influence = np.abs(jacobian).sum(-1)
        assert np.all(influence > 0), f"argument {argument} is not seen from everywhere"


def test_any_leading_axes_are_a_batch():
    params = diffusion.init(jax.random.key(0), config=SMALL)
    z = jax.random.normal(jax.random.key(1), (2, 3, SMALL.latent_dim))
    actions = jax.random.normal(jax.random.key(2), (2, 3, SMALL.horizon, 9))
    noised = jax.random.normal(jax.random.key(3), (2, 3, SMALL.horizon, SMALL.latent_dim))
    out = diffusion.velocity(params, z, actions, noised, jnp.zeros((2, 3), jnp.int32), config=SMALL)
    one = diffusion.velocity(
        params, z[1, 2], actions[1, 2], noised[1, 2], jnp.int32(0), config=SMALL
    )
    np.testing.assert_allclose(out[1, 2], one, atol=1e-5)


def test_markers_tell_positions_apart():
    params = diffusion.init(jax.random.key(0), config=SMALL)
    same = jnp.ones((SMALL.horizon, SMALL.latent_dim))
    z, actions = jnp.ones(SMALL.latent_dim), jnp.ones((SMALL.horizon, 9))
    out = diffusion.velocity(params, z, actions, same, jnp.int32(10), config=SMALL)
    assert np.abs(out[0] - out[1]).max() > 1e-6


def test_a_width_too_small_for_a_token_is_refused():
    config = dataclasses.replace(SMALL, transformer_width=32)
    with pytest.raises(ValueError, match="transformer_width 32 is too small"):
        diffusion.init(jax.random.key(0), config=config)


def test_initialisation_is_uniform_in_the_reference_bounds():
    config = PRESETS["paper"]
    observation = Observation(image=np.zeros((96, 96, 3), np.uint8), vector=np.zeros(7, np.float32))
    params = init_params(jax.random.key(0), observation, config=config)
    layer = params["value"]["head_0"]["linear_1"]["dense"]  # 512 -> 512
    bound = 512**-0.5
    for tensor in (layer["kernel"], layer["bias"]):
        assert np.abs(tensor).max() <= bound
        assert np.std(tensor) == pytest.approx(bound / 3**0.5, rel=0.1)
    kernel = params["encoder"]["conv_1"]["conv"]["kernel"]  # 3 x 3 x 16 -> 32
    assert 0.95 * 144**-0.5 < np.abs(kernel).max() <= 144**-0.5
    assert np.std(params["dynamics"]["timestep_embedding"]) == pytest.approx(1, rel=0.02)
    assert np.std(params["dynamics"]["target_markers"]) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("preset", ["tiny", "tdmpc2", "diffuser"])
def test_initial_parameters_are_arrays_of_the_expected_shapes(preset):
    config = default_config("pendulum", preset).replace(model={"action_dim": 3, "state_dim": 2})
    unet = dataclasses.replace(config.model.unet, width=16, multipliers=(1, 2))
    config = config.replace(model={"unet": unet})
    observation = Observation(vector=np.zeros(2, np.float32))
    params = init_params(jax.random.key(0), observation, config=config)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    expected = params_shapes(observation, config=config)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )


@pytest.mark.parametrize("shape", [(5, 4), (7, 33), (3, 3, 16, 40)])
def test_networks_start_with_the_same_numbers_inside_a_program(shape):
    key = jax.random.key(3)
    for initializer in (kernel_init, uniform_init(20), normal_init(0.02)):
        inside = jax.jit(functools.partial(initializer, shape=shape))(key)
        np.testing.assert_allclose(initializer(key, shape), inside, rtol=1e-6)
    published = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    np.testing.assert_allclose(kernel_init(key, shape), published(key, shape), rtol=1e-6)


@pytest.mark.parametrize("absent", ["image", "vector"])
def test_an_absent_modality_costs_no_parameters(absent):
    fields = {"image": np.zeros((96, 96, 3), np.uint8), "vector": np.zeros(7, np.float32)}
    fields[absent] = None
    config = PRESETS["tiny"]
    params = init_params(jax.random.key(0), Observation(**fields), config=config)
    assert not any(name.startswith(absent) for name in params["encoder"])
    if absent == "image":
        assert not any(name.startswith("conv") for name in params["encoder"])


def test_targets_are_the_encoders_latents_without_gradient():
    config = PRESETS["tiny"]
    rng = np.random.default_rng(0)
    observations = Observation(
        image=rng.integers(0, 256, (20, 6, 96, 96, 3), np.uint8),  # more than one tile
        vector=rng.standard_normal((20, 6, 7)).astype(np.float32),
    )
    example = jax.tree.map(lambda x: x[0, 0], observations)
    params = init_params(jax.random.key(0), example, config=config)
    expected = encode(params, observations, config=config)
    latents = encode_targets(params, observations, config=config)
    np.testing.assert_allclose(latents, expected, atol=1e-5)
    grads = jax.jit(jax.grad(lambda p: encode_targets(p, observations, config=config).sum()))(
        params
    )
    assert all(not np.any(g) for g in jax.tree.leaves(grads))
