import jax
import jax.numpy as jnp
import numpy as np
import pytest

from valdi_jax import diffusion
from valdi_jax.config import ModelConfig
from valdi_jax.dynamics import DYNAMICS


def test_the_schedule_falls_from_almost_clean_to_almost_noise():
    schedule = diffusion.alpha_bars(1000)
    assert schedule.shape == (1000,)
    assert np.all(np.diff(schedule) < 0)
    assert schedule[0] == pytest.approx(1 - 1e-4)
    assert schedule[-1] < 1e-4


def test_the_true_velocity_denoises_exactly():
    clean, noise = jax.random.normal(jax.random.key(0), (2, 5, 64))
    for alpha_bar in (0.01, 0.5, 0.99):
        noised = diffusion.add_noise(clean, noise, alpha_bar)
        velocity = diffusion.velocity_target(clean, noise, alpha_bar)
        np.testing.assert_allclose(diffusion.denoise(noised, velocity, alpha_bar), clean, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(1, [999]), (2, [999, 499]), (3, [999, 666, 333]), (4, [999, 749, 499, 249])],
)
def test_ddim_visits_the_timesteps_of_the_reference(steps, expected):
    assert diffusion.ddim_timesteps(steps, 1000) == expected


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_ddim_with_a_perfect_model_reaches_the_clean_sample(steps):
    clean, noise = jax.random.normal(jax.random.key(1), (2, 5, 64))
    schedule = jnp.asarray(diffusion.alpha_bars(1000))

    def velocity(sample, timestep):
        alpha_bar = schedule[timestep]
        implied = (sample - jnp.sqrt(alpha_bar) * clean) / jnp.sqrt(1 - alpha_bar)
        return diffusion.velocity_target(clean, implied, alpha_bar)

    sample = diffusion.ddim(velocity, noise, steps=steps, timesteps=1000)
    np.testing.assert_allclose(sample, clean, atol=1e-4)


@pytest.mark.parametrize("steps", [0, 1001])
def test_ddim_refuses_steps_outside_the_schedule(steps):
    with pytest.raises(ValueError, match="between 1 and 1000"):
        diffusion.ddim_timesteps(steps, 1000)


def test_a_share_of_each_batch_learns_the_step_that_samples_start_with():
    keys = jax.random.split(jax.random.key(0))
    share = ModelConfig(horizon=2, latent_dim=3, one_step_share=0.25)
    uniform, mixed = (
        DYNAMICS["diffusion"].draw(keys, 64, config=config)
        for config in (ModelConfig(horizon=2, latent_dim=3), share)
    )
    # Spread evenly, over the agent's own segments and the recorded ones behind them.
    chosen = np.arange(64) % 4 == 3
    np.testing.assert_array_equal(mixed.timesteps[chosen], 999)
    np.testing.assert_array_equal(mixed.timesteps[~chosen], uniform.timesteps[~chosen])
    np.testing.assert_array_equal(mixed.noise, uniform.noise)
    assert np.sum(uniform.timesteps == 999) < 3
