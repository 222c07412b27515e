"""MBDPO and TD-MPC2 as configurations: they train, resume, act, and are refused by one rule."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import run
from toy import CONFIG, make_counting

from valdi_jax import Agent, model
from valdi_jax.checkpoint import main
from valdi_jax.config import MBDPOConfig, PlannerConfig, require_terms, validate
from valdi_jax.data.rollout import exploration_noise
from valdi_jax.errors import UsageError
from valdi_jax.networks.twohot import decode, two_hot
from valdi_jax.observation import Observation
from valdi_jax.planners import PLANNERS, plan, propose_chunks
from valdi_jax.planners.base import Problem
from valdi_jax.presets import PRESETS, default_config
from valdi_jax.run import learner
from valdi_jax.run.log import read_jsonl
from valdi_jax.updates import init_state

EXAMPLE = Observation(vector=np.zeros(2, np.float32))
SMALL = {
    "latent_dim": 16,
    "policy_width": 16,
    "encoder_width": 16,
    "mlp_width": 16,
    "reward_width": 16,
    "value_width": 16,
}


def small(method, **changes):
    """A preset's method at the sizes of the toy runs."""
    preset = PRESETS[method]
    search = {"candidates": 16, "elites": 4, "iterations": 2, "policy_candidates": 3}
    search |= {"mbdpo": MBDPOConfig(steps=3)}
    config = CONFIG.replace(
        model={
            **{name: getattr(preset.model, name) for name in ("encoder", "networks", "rho")},
            **{name: getattr(preset.model, name) for name in ("bins", "dropout", "horizon")},
            "dynamics": preset.model.dynamics if method == "tdmpc2" else CONFIG.model.dynamics,
            **SMALL,
        },
        planner={"kind": preset.planner.kind, "answer": preset.planner.answer, **search},
        learn={
            name: getattr(preset.learn, name)
            for name in ("terms", "target_encoder", "encoder_rate", "last_step")
        },
    )
    return config.replace(**changes)


@pytest.fixture(scope="module", params=["mbdpo", "tdmpc2"])
def trained(request, tmp_path_factory):
    config = small(request.param)
    directory = tmp_path_factory.mktemp("methods") / request.param
    state, _ = run(directory, 4, config=config)
    return config, directory, state


def test_a_method_learns_and_its_metrics_say_so(trained):
    config, directory, state = trained
    fresh = init_state(jax.random.key(config.seed), EXAMPLE, config=config)
    for network in config.model.networks:
        moved = jax.tree.map(
            lambda a, b: bool(np.any(a != b)), fresh.params[network], state.params[network]
        )
        assert any(jax.tree.leaves(moved)), network
    record = read_jsonl(directory / "metrics.jsonl")[-1]
    assert np.isfinite([record["loss/policy"], record["policy/q_range"]]).all()
    assert 0 < record["plan/drift"] < 2
    assert record["plan/td_error"] > 0
    assert ("plan/energy" in record) == ("energy" in config.model.networks)
    if "energy" in config.model.networks:
        statistics = state.params["statistics"]
        assert float(statistics["energy_mean"]) != 0
        assert record["energy/replayed"] != record["energy/negative"]


def test_a_resumed_run_of_a_method_equals_a_straight_one(trained, tmp_path):
    config, _, straight = trained
    run(tmp_path / "run", 3, config=config)
    resumed, _ = run(tmp_path / "run", 4, resume=True, config=config)
    chex.assert_trees_all_equal(resumed, straight)


def test_a_method_exports_and_acts(trained, tmp_path):
    _, directory, state = trained
    main([str(directory), "--export", str(tmp_path / "agent")])
    agent = Agent.load(tmp_path / "agent", make=make_counting)
    chex.assert_trees_all_equal(agent.params, state.acting)
    action = agent.act(agent.make_env().reset(seed=1)[0])
    assert action.shape == (3,)


@pytest.mark.parametrize("method", ["mbdpo", "tdmpc2"])
@pytest.mark.parametrize("env", ["pendulum", "lunarlander", "dmc:cup-catch", "gym:Any-v0"])
def test_a_method_keeps_the_task_of_an_environment(method, env):
    config, own = default_config(env, method), default_config(env, None)
    assert config.env == own.env
    assert dataclasses.replace(config.collect, seed_noise=0.0) == own.collect
    assert config.planner.kind == PRESETS[method].planner.kind
    assert config.learn.bootstrap_terminal == own.learn.bootstrap_terminal


@pytest.mark.parametrize("method", ["mbdpo", "tdmpc2"])
def test_methods_take_images_with_and_without_a_vector(method):
    config = default_config("carracing", method)
    sizes = dataclasses.replace(config.model, state_dim=9, action_dim=3)
    config = dataclasses.replace(config, model=sizes)
    image = np.random.default_rng(0).integers(0, 255, (2, 3, 48, 48, 9), np.uint8)
    for vector in (None, np.ones((2, 3, 9), np.float32)):
        observation = Observation(image=image, vector=vector)
        example = jax.tree.map(lambda x: x[0, 0], observation)
        learner.check(example, config)
        params = model.init_params(jax.random.key(0), example, config=config)
        latents = model.encode(params, observation, config=config)
        assert latents.shape == (2, 3, config.model.latent_dim)
        other = model.encode(params, Observation(image[::-1], vector), config=config)
        assert not np.allclose(latents, other)
        if method == "tdmpc2":
            np.testing.assert_allclose(latents.reshape(2, 3, -1, 8).sum(-1), 1, rtol=1e-5)


def test_an_untrained_simplex_encoder_tells_images_apart_that_differ_in_few_pixels():
    """Else its own dynamics' loss makes all latents equal, and the agent learns nothing."""
    config = default_config("dmc:cartpole-swingup", "tdmpc2")
    images = np.full((16, 64, 64, 9), 90, np.uint8)
    for i, image in enumerate(images):
        image[30:34, 4 * i : 4 * i + 4] = 200
    observation = Observation(image=images, vector=None)
    example = jax.tree.map(lambda x: x[0], observation)
    params = model.init_params(jax.random.key(0), example, config=config)
    latents = model.encode(params, observation, config=config)
    assert latents.std(0).mean() > 0.05 * latents.std(1).mean()


def checked(config):
    validate(config)
    require_terms(config)
    learner.check_names(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"networks": ("policy",)}}, "energy needs --model.networks energy"),
        ({"learn": {"terms": ("q", "policy", "energy")}}, "q needs --model.networks q"),
        ({"learn": {"terms": ("dynamics", "energy")}}, "networks has policy: give --learn.terms"),
        (
            {"model": {"networks": ("q", "policy")}, "learn": {"terms": ("reward", "policy")}},
            "networks has q: give --learn.terms q too",
        ),
        ({"model": {"encoder": "simplex"}}, "need each other"),
        ({"model": {"bins": 1}}, "must be 0 or at least 2"),
        ({"planner": {"policy_candidates": 64}}, "must be below --planner.candidates"),
        ({"planner": {"kind": "icem", "answer": "sample"}}, "kind mppi: give best or mean"),
        ({"planner": {"kind": "diffuser", "candidates": 4}}, "kind diffuser needs"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        checked(PRESETS["mbdpo"].replace(**change))


@pytest.mark.parametrize("method", ["valdi-q", "tdmpc2"])
def test_an_agent_searches_otherwise_without_options_of_the_other_search(method):
    trained = PRESETS[method]
    checked(trained.replace(planner={"kind": "mbdpo"}))  # its answer is its mean
    checked(
        trained.replace(planner={"kind": "cem", "answer": "mean", "candidates": 8, "elites": 4})
    )


@pytest.mark.parametrize("dynamics", ["diffusion", "mlp"])  # by trajectories, by steps
def test_a_policy_proposes_candidates_from_any_dynamics(dynamics):
    config = small("mbdpo", model={"dynamics": dynamics})
    params = init_state(jax.random.key(0), EXAMPLE, config=config).params
    horizon, size = config.model.horizon, config.model.chunk * config.model.action_dim
    z = model.encode(params, EXAMPLE, config=config)
    noise = jnp.zeros((horizon, 2, size))
    chunks = propose_chunks(params, z, noise, config=config)
    assert chunks.shape == (2, horizon, size)
    first = model.policy(params, z, noise[0, 0], config=config).action
    np.testing.assert_allclose(chunks[0, 0], first, atol=1e-6)
    found = plan(params, EXAMPLE, jax.random.key(1), config=config)
    assert np.isfinite(found.predicted_return)


@pytest.mark.parametrize("kind", ["mbdpo", "mppi"])
def test_a_search_takes_the_best_of_what_the_policy_proposes(kind):
    """Far from where it samples by itself."""
    target = jnp.full((4, 1), 0.95)

    def score(sequences, key):
        return -jnp.sum(jnp.abs(sequences - target[None]), axis=(1, 2))

    problem = Problem((4, 1), 1, score, lambda key: target[None] * jnp.array([[[0.0]], [[1.0]]]))
    config = PlannerConfig(candidates=8, elites=2, iterations=1, mbdpo=MBDPOConfig(steps=2))
    planner = PLANNERS[kind]
    found, _ = planner.search(
        problem, planner.init((4, 1), config=config), jax.random.key(0), config=config
    )
    alone, _ = planner.search(
        problem._replace(propose=None),
        planner.init((4, 1), config=config),
        jax.random.key(0),
        config=config,
    )
    worse = float(jnp.abs(alone.sequence - target).sum())
    assert float(jnp.abs(found.sequence - target).sum()) < 0.5 * worse


def test_seed_episodes_have_their_own_noise():
    config = PRESETS["tdmpc2"].collect
    assert exploration_noise(-1, config) == 1.0
    assert exploration_noise(0, config) == config.noise_start
    assert exploration_noise(-1, PRESETS["gym"].collect) == PRESETS["gym"].collect.noise_start


def test_two_hot_values_keep_their_precision_in_bfloat16():
    logits = jnp.log(two_hot(jnp.linspace(95.0, 100.0, 11), 101) + 1e-6)
    half = decode(logits.astype(jnp.bfloat16))
    np.testing.assert_allclose(half, decode(logits), rtol=1e-2)


def test_the_energy_of_a_candidate_enters_its_return():
    config = small("mbdpo")
    params = init_state(jax.random.key(0), EXAMPLE, config=config).params
    params = jax.tree.map(lambda x: x + 0.01, params)

    def returned(eta):
        weighted = dataclasses.replace(config.planner, eta=eta)
        found = plan(
            params, EXAMPLE, jax.random.key(1), config=dataclasses.replace(config, planner=weighted)
        )
        return float(found.predicted_return)

    assert returned(5.0) != returned(0.0)
