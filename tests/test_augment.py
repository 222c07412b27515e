import jax
import numpy as np
import pytest
from gymnasium.envs.box2d.car_dynamics import WHEELPOS
from toy import CONFIG

from valdi_jax.data.augment import AugmentDraws, augment, mirror, shift
from valdi_jax.losses import draw, objective
from valdi_jax.model import init_params
from valdi_jax.observation import Observation
from valdi_jax.presets import PRESETS
from valdi_jax.types import Batch


def random_batch(size=3, side=6):
    rng = np.random.default_rng(0)
    return Batch(
        observations=Observation(
            image=rng.integers(0, 256, (size, 7, side, side, 3), np.uint8),
            vector=rng.standard_normal((size, 7, 7)).astype(np.float32),
        ),
        actions=rng.uniform(-1, 1, (size, 6, 9)).astype(np.float32),
        rewards=rng.standard_normal((size, 6, 3)).astype(np.float32),
        terminals=np.zeros((size, 6), np.float32),
    )


def draws(**changes):
    return AugmentDraws(**changes)


def test_a_mirrored_segment_by_hand():
    batch = random_batch()
    mirrored = mirror(batch)
    np.testing.assert_array_equal(
        mirrored.observations.image[..., 0, :], batch.observations.image[..., -1, :]
    )
    vector = batch.observations.vector
    speed, front_left, front_right, rear_left, rear_right, steering, gyroscope = vector[0, 0]
    np.testing.assert_array_equal(
        mirrored.observations.vector[0, 0],
        [speed, front_right, front_left, rear_right, rear_left, -steering, -gyroscope],
    )
    steer, gas, brake = batch.actions[0, 0, 3:6]
    np.testing.assert_array_equal(mirrored.actions[0, 0, 3:6], [-steer, gas, brake])
    jax.tree.map(np.testing.assert_array_equal, mirror(mirrored), batch)


def test_the_swapped_wheels_are_opposite():
    wheels = np.array(WHEELPOS)  # across, along; the ABS sensors come in this order
    np.testing.assert_allclose(wheels[[1, 0, 3, 2]], wheels * [-1, 1])


def test_a_shift_by_hand():
    image = np.arange(9, dtype=np.uint8).reshape(3, 3, 1)
    moved = shift(image, np.array([1, -1]))[..., 0]
    np.testing.assert_array_equal(moved, [[1, 2, 2], [1, 2, 2], [4, 5, 5]])


def test_frames_of_a_segment_change_alike_and_other_segments_do_not():
    batch = random_batch()
    changed = augment(
        batch,
        draws(mirrored=np.array([True, False, False]), shifts=np.array([[0, 0], [2, 1], [0, 0]])),
    )
    one = jax.tree.map(lambda x: x[0], batch)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: x[0], changed), mirror(one))
    image = batch.observations.image
    np.testing.assert_array_equal(changed.observations.image[1, :, 2:, 1:], image[1, :, :-2, :-1])
    for part in (changed.rewards, changed.terminals):
        assert part.shape[0] == 3
    third = jax.tree.map(lambda x: x[2], (changed, batch))
    jax.tree.map(np.testing.assert_array_equal, *third)


def test_only_carracing_can_be_mirrored():
    batch = random_batch()
    blind = batch.replace(observations=batch.observations._replace(image=None))
    with pytest.raises(ValueError, match="only CarRacing's frames"):
        mirror(blind)


def test_the_objective_is_that_of_the_augmented_segments():
    config = PRESETS["tiny"]
    batch = random_batch(side=96)
    params, ema_params = (
        init_params(
            jax.random.key(i), jax.tree.map(lambda x: x[0, 0], batch.observations), config=config
        )
        for i in range(2)
    )
    plain = draw(jax.random.key(0), 3, config=config)
    all_mirrored = plain | {"augment": draws(mirrored=np.ones(3, bool))}
    asked, _ = objective(params, ema_params, batch, all_mirrored, config=config)
    expected, _ = objective(params, ema_params, mirror(batch), plain, config=config)
    unchanged, _ = objective(params, ema_params, batch, plain, config=config)
    np.testing.assert_allclose(asked, expected, rtol=1e-6)
    assert abs(float(asked - unchanged)) > 1e-4


def test_augmentations_are_off_by_default():
    batch = random_batch()
    assert augment(batch, draws()) is batch


@pytest.mark.parametrize("changes", [{"mirror": True}, {"random_shift": 4}])
def test_other_draws_stay_the_same(changes):
    key = jax.random.key(3)
    plain = draw(key, 400, config=CONFIG)
    drawn = draw(key, 400, config=CONFIG.replace(learn=changes))
    noise_key, timestep_key, _ = jax.random.split(key, 3)  # as without other draws
    model = CONFIG.model
    noise = jax.random.normal(noise_key, (400, model.horizon, model.latent_dim))
    np.testing.assert_array_equal(drawn["dynamics"].noise, noise)
    timesteps = jax.random.randint(timestep_key, (400,), 0, model.diffusion_timesteps)
    np.testing.assert_array_equal(drawn["dynamics"].timesteps, timesteps)
    np.testing.assert_array_equal(drawn["sigreg"], plain["sigreg"])
    assert plain["augment"] == draws()
    if "mirror" in changes:
        assert 150 < drawn["augment"].mirrored.sum() < 250
    else:
        assert set(np.unique(drawn["augment"].shifts)) == set(range(-4, 5))
