"""Guided sampling on latents, and its prior."""

import io

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from test_train import run
from toy import CONFIG, make_counting

from valdi_jax import model
from valdi_jax.config import DiffuserConfig, PriorConfig, UNetConfig, require_terms, validate
from valdi_jax.data.rollout import first_carries, plan_batch
from valdi_jax.diffusion import cosine_posterior
from valdi_jax.errors import UsageError
from valdi_jax.observation import Observation
from valdi_jax.planners import plan
from valdi_jax.planners.guided import goal_latent, sample_plans
from valdi_jax.planners.sampling import follow
from valdi_jax.planners.scoring import trajectory_return
from valdi_jax.presets import default_config
from valdi_jax.run import learner
from valdi_jax.run.log import read_jsonl
from valdi_jax.train import train
from valdi_jax.updates import init_state

OBS = Observation(vector=jnp.array([0.3, -0.2]))
SAMPLING = {"guide_steps": 1, "guide_stop": 0}
WITH_PRIOR = CONFIG.replace(
    model={"networks": ("prior",), "prior": PriorConfig(timesteps=4)},
    learn={"terms": (*CONFIG.learn.terms, "prior")},
)


def guided(**settings):
    """The toy configuration with the planner, and some of its settings."""
    section = DiffuserConfig(**{**SAMPLING, **settings})
    return WITH_PRIOR.replace(planner={"kind": "guided", "candidates": 16, "diffuser": section})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that learns a prior beside the world model, and plans with CEM."""
    directory = tmp_path_factory.mktemp("guided") / "run"
    state, _ = run(directory, 4, config=WITH_PRIOR)
    return directory, state


def test_a_prior_learns_and_leaves_the_world_model_as_it_is(trained, tmp_path):
    directory, state = trained
    without, _ = run(tmp_path / "run", 4, config=CONFIG)
    params = dict(state.params)
    prior = params.pop("prior")
    chex.assert_trees_all_close(params, without.params, rtol=0, atol=1e-6)
    fresh = init_state(jax.random.key(CONFIG.seed), OBS, config=WITH_PRIOR).params["prior"]
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), fresh, prior)
    assert all(jax.tree.leaves(moved))
    record = read_jsonl(directory / "metrics.jsonl")[-1]
    assert np.isfinite(record["loss/prior"])


def test_an_agent_gets_a_prior_later_and_only_this_learns(tmp_path):
    """What others are built on stays, the normaliser too."""
    normalized = CONFIG.replace(model={"normalize": True})
    agent, _ = run(tmp_path / "agent", 3, config=normalized)
    config = WITH_PRIOR.replace(
        model={"normalize": True}, learn={"terms": ("prior",)}, collect={"episodes": 4}
    )
    output = io.StringIO()
    state = train(
        config,
        tmp_path / "run",
        make=make_counting,
        init_from=tmp_path / "agent",
        console=Console(file=output),
    )
    assert "note: prior starts untrained" in output.getvalue()
    assert int(state.step) > 0
    params = dict(state.params)
    prior = params.pop("prior")
    chex.assert_trees_all_equal(params, agent.params)
    fresh = init_state(jax.random.key(CONFIG.seed), OBS, config=config).params["prior"]
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (prior, fresh)), strict=True))


def test_a_resumed_run_that_plans_with_its_prior_equals_a_straight_one(tmp_path):
    config = guided(warm_start=2)
    straight, _ = run(tmp_path / "straight", 4, config=config)
    run(tmp_path / "run", 3, config=config)
    resumed, _ = run(tmp_path / "run", 4, resume=True, config=config)
    chex.assert_trees_all_equal(resumed, straight)


def returns(state, **settings):
    """Mean predicted return of the sampled plans themselves."""
    config = guided(**settings)
    params = state.params
    z = model.encode(params, OBS, config=config)
    goal = jnp.zeros_like(z)
    plans = sample_plans(params, z, goal, jax.random.key(1), rows=None, config=config)
    size = config.model.chunk * config.model.action_dim
    zs = jnp.broadcast_to(z, (len(plans), *z.shape))
    values = trajectory_return(params, zs, plans[..., size:], plans[..., :size], config=config)
    return float(values.mean())


def of_standard_normal(params, z, plans, timesteps, *, config):
    """The exact estimate where plans are standard normal."""
    alpha_bars = jnp.asarray(cosine_posterior(config.model.prior.timesteps).alpha_bars)
    return jnp.sqrt(alpha_bars)[timesteps][:, None, None] * plans


@pytest.mark.parametrize("through", [False, True])
def test_guidance_raises_the_return_of_sampled_plans(trained, monkeypatch, through):
    _, state = trained
    monkeypatch.setattr(model, "denoise_prior", of_standard_normal)
    unguided = returns(state, scale=0.0)
    small, large = (returns(state, scale=scale, through=through) for scale in (1.0, 3.0))
    assert unguided < small < large


def test_the_answer_is_the_sample_that_the_world_model_values_most(trained):
    _, state = trained
    config = guided(scale=0.0).replace(planner={"shared_noise": True})
    one = config.replace(planner={"candidates": 1})
    best = plan(state.params, OBS, jax.random.key(2), config=config)
    values = [plan(state.params, OBS, jax.random.key(k), config=one) for k in range(8)]
    assert best.predicted_return > np.mean([each.predicted_return for each in values])
    assert np.abs(best.actions).max() <= 1
    np.testing.assert_array_equal(best.actions, best.mean)
    noised = plan(state.params, OBS, jax.random.key(2), config=config, noise_std=0.1)
    np.testing.assert_array_equal(noised.mean, best.mean)
    assert np.any(noised.actions != best.actions)
    with pytest.raises(UsageError, match="obs does not fit the parameters"):
        plan(state.params, Observation(vector=jnp.zeros(3)), jax.random.key(0), config=config)


def test_a_warm_start_stays_near_the_last_plan(trained, monkeypatch):
    _, state = trained
    monkeypatch.setattr(model, "denoise_prior", of_standard_normal)
    config = guided(warm_start=1, scale=0.0)
    z = model.encode(state.params, OBS, config=config)
    last = jnp.linspace(-0.9, 0.9, model.known_of_prior(config).size)
    last = last.reshape(model.known_of_prior(config).shape)
    again, fresh = (
        sample_plans(state.params, z, z, jax.random.key(4), rows=rows, config=config)
        for rows in (last, None)
    )

    def distance(plans):
        return float(jnp.abs(plans - last[None]).mean())

    assert distance(again) < 0.6 * distance(fresh)
    np.testing.assert_array_equal(follow(last, 2)[:-2], last[2:])
    np.testing.assert_array_equal(follow(last, 2)[-1], last[-1])


def test_environments_of_a_batch_start_warm_or_fresh_each_by_itself(trained):
    _, state = trained
    config = guided(warm_start=1)
    observations = Observation(vector=np.linspace(-1, 1, 4, dtype=np.float32).reshape(2, 2))
    keys = jax.random.split(jax.random.key(5), 2)
    settings = {"config": config.graph}
    start = np.zeros(2, np.int32), np.float32(0), first_carries(2, config)
    carries = plan_batch(state.params, observations, keys, *start, **settings).carry
    decisions = np.array([1, 0], np.int32)  # the second begins another episode
    plans = plan_batch(
        state.params, observations, keys, decisions, np.float32(0), carries, **settings
    )
    assert plans.carry.step.tolist() == [2, 1]
    alone = jax.tree.map(lambda x: x[0], (observations, carries))
    again = plan_batch(
        state.params,
        *jax.tree.map(lambda x: x[None], alone[:1]),
        keys[:1],
        decisions[:1],
        np.float32(0),
        jax.tree.map(lambda x: x[None], alone[1]),
        **settings,
    )
    np.testing.assert_allclose(plans.actions[0], again.actions[0], atol=1e-5)


def test_a_goal_is_the_last_latent():
    config = guided().replace(
        model={"prior": PriorConfig(timesteps=4, goal=1), "networks": ("prior",)}
    )
    params = model.init_params(jax.random.key(0), OBS, config=config)
    size = config.model.chunk * config.model.action_dim
    z = model.encode(params, OBS, config=config)
    goal = goal_latent(params, OBS, config=config)
    there = Observation(vector=jnp.array([-0.2, -0.2]))
    np.testing.assert_allclose(goal, model.encode(params, there, config=config), atol=1e-6)
    plans = sample_plans(params, z, goal, jax.random.key(1), rows=None, config=config)
    np.testing.assert_array_equal(
        plans[:, -1, size:], jnp.broadcast_to(goal, plans[:, -1, size:].shape)
    )
    assert np.any(plans[0, 0, size:] != goal)


def test_diffuser_starts_warm_too(monkeypatch):
    config = default_config("pendulum", "diffuser").replace(
        model={
            "networks": ("unet",),
            "horizon": 7,
            "action_dim": 1,
            "state_dim": 3,
            "unet": UNetConfig(width=8, multipliers=(1, 2), timesteps=4),
        },
        planner={"candidates": 1, "diffuser": DiffuserConfig(warm_start=1)},
        learn={"terms": ("plan",)},
    )
    validate(config)
    alpha_bars = jnp.asarray(cosine_posterior(4).alpha_bars)

    def of_standard_normal(params, plans, timesteps, *, config):
        return jnp.sqrt(alpha_bars)[timesteps][:, None, None] * plans

    monkeypatch.setattr(model, "denoise_plans", of_standard_normal)
    obs = Observation(vector=jnp.array([0.1, 0.2, 0.3]))
    params = model.init_params(jax.random.key(0), obs, config=config)
    scaled = {"center": jnp.full(1, 0.4), "scale": jnp.full(1, 0.1)}
    params["scalers"] |= {"actions": params["scalers"]["actions"] | scaled}
    first = plan(params, obs, jax.random.key(1), config=config)
    warm = plan(params, obs, jax.random.key(2), config=config, carry=first.carry)
    fresh = plan(params, obs, jax.random.key(2), config=config)
    assert (int(first.carry.step), int(warm.carry.step)) == (1, 2)

    def distance(other):
        return float(jnp.abs(other.mean[:-1] - first.mean[1:]).mean())

    assert distance(warm) < 0.7 * distance(fresh)
    np.testing.assert_allclose(warm.carry.rows[0, 1:], obs.vector, atol=1e-6)


def checked(config):
    validate(config)
    require_terms(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIG.replace(planner={"kind": "guided"}), "guided needs --model.networks prior"),
        (CONFIG.replace(model={"networks": ("prior",)}), "give --learn.terms prior too"),
        (guided(warm_start=5), "at most --model.prior.timesteps"),
        (guided(warm_start=2, guide_stop=2), "the last 2 timesteps have no guidance"),
        (guided().replace(planner={"precision": "bfloat16"}), "guided samples in float32"),
        (
            guided().replace(model={"chunk": 2}, planner={"action_hold": 2}),
            "guided samples every action",
        ),
        (CONFIG.replace(model={"prior": PriorConfig(goal=1)}), "goal needs --model.networks"),
    ],
)
def test_what_does_not_fit_is_refused(config, message):
    with pytest.raises(UsageError, match=message):
        checked(config)


def test_networks_that_are_trained_need_no_term():
    config = CONFIG.replace(
        model={"networks": ("q", "policy", "prior")}, learn={"terms": ("prior",)}
    )
    with pytest.raises(UsageError, match="has q: give"):
        require_terms(config)
    require_terms(config, trained=("q", "policy"))


def test_a_goal_needs_an_observation_that_holds_one():
    config = guided().replace(model={"prior": PriorConfig(goal=2)})
    with pytest.raises(UsageError, match="for vector observations that hold a goal"):
        learner.check(OBS, config)
