"""Diffuser's planner."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PARITY

from valdi_jax.config import UNetConfig
from valdi_jax.data.rollout import first_carries, plan_batch
from valdi_jax.diffusion import Guide, cosine_posterior, guided_sample
from valdi_jax.errors import UsageError
from valdi_jax.model import init_params, known_of_plans
from valdi_jax.networks.scaler import fit, unscale
from valdi_jax.observation import Observation
from valdi_jax.planners import plan
from valdi_jax.planners.diffuser import waypoint_actions
from valdi_jax.planners.sampling import once
from valdi_jax.presets import default_config

NUMBERS = np.load(PARITY / "diffuser.npz", allow_pickle=False)
MAZE = default_config("maze:umaze", None).replace(
    model={
        "horizon": 7,
        "action_dim": 2,
        "state_dim": 4,
        "unet": UNetConfig(width=8, multipliers=(1, 2), timesteps=4, scaler="limits", goal=2),
    },
)
EXAMPLE = Observation(vector=np.zeros(6, np.float32))


def test_the_waypoint_controller_is_the_authors():
    limits = {name: NUMBERS[f"maze2d/plan/{name}"] for name in ("mins", "maxs")}
    scaler = fit("limits", np.stack([limits["mins"], limits["maxs"]]))
    planned = NUMBERS["maze2d/sample/trajectories"][0, :, 2:]
    states = unscale(scaler, planned, kind="limits")
    np.testing.assert_allclose(states, NUMBERS["maze2d/plan/observations"], atol=1e-5)
    for state, step, action in zip(
        *(NUMBERS[f"maze2d/plan/{name}"] for name in ("states", "steps", "actions")), strict=True
    ):
        ours = waypoint_actions(states, jnp.asarray(state), jnp.array([step]))
        np.testing.assert_allclose(ours[0], action, atol=1e-4)


def test_guidance_shifts_a_gaussian_by_as_much_as_its_scale():
    posterior = cosine_posterior(200)

    def denoise(x, timestep):
        alpha_bar = jnp.asarray(posterior.alpha_bars)[timestep]
        return jnp.sqrt(alpha_bar) * x  # the exact estimate for a standard normal

    noise = jax.random.normal(jax.random.key(0), (201, 4000, 1, 1))

    def means(scale):
        guide = Guide(lambda x, _: x[:, 0, 0], scale, steps=1, stop=0)
        samples, _ = guided_sample(denoise, noise, lambda x: x, posterior=posterior, guide=guide)
        return float(samples.mean()), float(samples.std())

    (unguided, spread), (half, _), (whole, _) = (means(scale) for scale in (0.0, 0.25, 0.5))
    assert abs(unguided) < 0.05
    assert abs(spread - 1) < 0.05
    assert half > unguided + 0.2
    np.testing.assert_allclose(whole - unguided, 2 * (half - unguided), rtol=1e-3)


def test_samples_without_guidance_have_values_to_choose_by():
    posterior = cosine_posterior(4)
    noise = jax.random.normal(jax.random.key(0), (5, 8, 1, 1))
    guide = Guide(lambda x, _: x[:, 0, 0], 1.0, steps=0, stop=0)
    _, values = guided_sample(lambda x, _: x, noise, lambda x: x, posterior=posterior, guide=guide)
    assert np.unique(values).size == 8


@pytest.mark.parametrize(
    ("obs", "message"),
    [
        (Observation(vector=np.zeros(7, np.float32)), r"a vector \(7,\), not one \(6,\)"),
        (Observation(image=np.zeros((9, 9, 3), np.uint8)), "no vector"),
    ],
)
def test_an_observation_that_does_not_fit_is_named(obs, message):
    params = init_params(jax.random.key(0), EXAMPLE, config=MAZE)
    with pytest.raises(UsageError, match=message):
        plan(params, obs, jax.random.key(0), config=MAZE)


def test_both_ends_of_a_plan_are_pinned_and_its_states_followed():
    params = init_params(
        jax.random.key(0), Observation(vector=np.zeros(6, np.float32)), config=MAZE
    )
    assert known_of_plans(MAZE).sum() == 8
    vector = np.array([0.1, 0.2, 0.3, 0.4, 0.5, -0.6], np.float32)
    first = plan(params, Observation(vector=jnp.asarray(vector)), jax.random.key(1), config=MAZE)
    rows = first.carry.rows
    np.testing.assert_allclose(rows[0, 2:], vector[:4], atol=1e-6)
    np.testing.assert_allclose(rows[-1, 2:], [0.5, -0.6, 0, 0], atol=1e-6)
    toward = waypoint_actions(rows[:, 2:], jnp.asarray(vector[:4]), jnp.arange(7))
    np.testing.assert_allclose(first.actions, np.clip(toward, -1, 1), atol=1e-6)
    # The second decision keeps the plan, whatever is observed, and its key.
    moved = Observation(vector=jnp.asarray(vector + 0.1))
    second = plan(params, moved, jax.random.key(2), config=MAZE, carry=first.carry)
    np.testing.assert_array_equal(second.carry.rows, rows)
    assert int(second.carry.step) == 2
    toward = waypoint_actions(rows[:, 2:], moved.vector[:4], 1 + jnp.arange(7))
    np.testing.assert_allclose(second.actions, np.clip(toward, -1, 1), atol=1e-6)


def test_a_plan_that_is_left_behind_is_sampled_anew():
    near = 0.2
    config = MAZE.replace(
        planner={"diffuser": dataclasses.replace(MAZE.planner.diffuser, replan_distance=near)}
    )
    params = init_params(jax.random.key(0), EXAMPLE, config=config)
    first = plan(params, EXAMPLE, jax.random.key(1), config=config)
    rows = first.carry.rows

    def then(offset):
        vector = jnp.zeros(6).at[:2].set(rows[1, 2:4] + jnp.array([offset, 0.0]))
        return plan(
            params, Observation(vector=vector), jax.random.key(2), config=config, carry=first.carry
        ).carry

    kept, left = then(0.9 * near), then(1.1 * near)
    np.testing.assert_array_equal(kept.rows, rows)
    assert int(kept.step) == 2
    # The other begins where it is.
    np.testing.assert_allclose(
        left.rows[0, 2:4], rows[1, 2:4] + jnp.array([1.1 * near, 0]), atol=1e-6
    )
    assert int(left.step) == 1


def test_environments_of_a_batch_keep_their_own_plans():
    params = init_params(
        jax.random.key(0), Observation(vector=np.zeros(6, np.float32)), config=MAZE
    )
    observations = Observation(vector=np.linspace(-1, 1, 18, dtype=np.float32).reshape(3, 6))
    keys = jax.random.split(jax.random.key(3), 3)
    settings = {"config": MAZE.graph}
    start = np.zeros(3, np.int32), np.float32(0), first_carries(3, MAZE)
    carries = plan_batch(params, observations, keys, *start, **settings).carry
    decisions = np.array([1, 0, 1], np.int32)  # the second begins another episode
    other = Observation(vector=observations.vector + 0.5)
    after = plan_batch(params, other, keys, decisions, np.float32(0), carries, **settings).carry
    kept = [np.array_equal(a, b) for a, b in zip(after.rows, carries.rows, strict=True)]
    assert kept == [True, False, True]
    assert after.step.tolist() == [2, 1, 2]
    np.testing.assert_allclose(after.rows[1, 0, 2:], other.vector[1, :4], atol=1e-6)


def test_nothing_is_computed_unless_some_need_it():
    computed = []

    def compute(x):
        jax.debug.callback(lambda x: computed.append(len(np.atleast_1d(x))), x.sum())
        return 2 * x

    each = jax.jit(jax.vmap(once(compute), in_axes=(0, 0, 0)))
    before, x = jnp.full((3, 2), 7.0), jnp.arange(6.0).reshape(3, 2)
    untouched = jax.block_until_ready(each(jnp.zeros(3, bool), before, x))
    jax.effects_barrier()
    np.testing.assert_array_equal(untouched, before)
    assert not computed
    some = each(jnp.array([False, True, False]), before, x)
    np.testing.assert_array_equal(some, [[7, 7], [4, 6], [7, 7]])
    jax.effects_barrier()
    assert computed
