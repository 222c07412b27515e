import dataclasses
import io

import gymnasium as gym
import pytest
from rich.console import Console
from toy import CONFIG

from valdi_jax.config import Config, added_since, from_dict, to_dict, validate
from valdi_jax.errors import UsageError
from valdi_jax.presets import PRESETS, default_config
from valdi_jax.train import train


def test_the_paper_preset_is_table_3():
    paper = PRESETS["paper"]
    assert paper.learn.discount == 0.99
    assert paper.collect.seed_episodes == 10
    assert paper.replay.capacity == 1000
    assert (paper.model.horizon, paper.model.chunk) == (5, 3)
    assert (paper.planner.candidates, paper.planner.elites) == (512, 64)
    assert paper.planner.iterations == 10
    assert paper.planner.diffusion_steps == 1
    assert paper.planner.answer == "best"
    assert not paper.planner.shared_noise
    assert paper.model.latent_dim == 64
    assert paper.learn.learning_rate == 3e-4
    assert (paper.learn.adam_b1, paper.learn.adam_b2) == (0.9, 0.999)
    assert (paper.learn.reward_weight, paper.learn.value_weight) == (0.01, 0.01)
    assert (paper.learn.diffusion_weight, paper.learn.sigreg_weight) == (1.0, 0.05)
    assert (paper.collect.noise_start, paper.collect.noise_end) == (0.25, 0.05)
    assert (paper.collect.noise_hold, paper.collect.noise_decay) == (250, 250)
    assert paper.learn.batch_size == 256
    assert paper.learn.ema_rate == 0.005
    assert paper.learn.updates_per_step * paper.env.max_steps == pytest.approx(60)
    assert paper.env.patience == 0
    assert paper.learn.bootstrap_terminal
    assert paper.learn.td_encoder == "online"


def test_every_environment_has_a_preset_that_suits_it():
    assert default_config(None, None) == default_config("carracing", None) == PRESETS["paper"]
    assert default_config("carracing", "cpu") == default_config(None, "cpu") == PRESETS["cpu"]
    assert default_config("lunarlander", None) == PRESETS["lunarlander"]
    assert default_config("gym:Ant-v5", None) == PRESETS["gym"].replace(env={"name": "gym:Ant-v5"})
    for name, config in PRESETS.items():
        validate(config)
        vector = name not in ("paper", "cpu", "tiny")
        own = "tdmpc2" in name or config.diffuses_plans  # they normalise by themselves, or not
        assert config.model.normalize == (vector and not own)
        assert config.learn.bootstrap_terminal != vector


def test_a_preset_for_another_environment_keeps_what_belongs_to_the_environment():
    config = default_config("lunarlander", "tiny")
    assert config.env == PRESETS["lunarlander"].env
    assert config.model == dataclasses.replace(PRESETS["tiny"].model, normalize=True, chunk=1)
    assert config.learn == dataclasses.replace(
        PRESETS["tiny"].learn, bootstrap_terminal=False, reward_scale=0.1, discount=0.98
    )
    assert config.planner == PRESETS["tiny"].planner
    config = default_config("mountaincar", "pendulum")
    assert config.env == PRESETS["mountaincar"].env
    assert (config.model.chunk, config.learn.reward_scale) == (1, 1)
    assert default_config("bipedalwalker", "tiny").replay == dataclasses.replace(
        PRESETS["tiny"].replay, sampling="step"
    )
    other = default_config("gym:Pendulum-v1", "pendulum")
    assert other == PRESETS["pendulum"].replace(env={"name": "gym:Pendulum-v1"})


def test_a_mazes_own_settings_are_diffusers_alone():
    maze = default_config("maze:medium-multi", None)
    assert (maze.env.name, maze.model.horizon) == ("maze:medium-multi", 255)
    assert default_config("maze:medium-multi", "diffuser") == maze
    for method in ("valdi-q", "mbdpo", "tdmpc2", "mbdpo-tdmpc2"):
        config = default_config("maze:umaze", method)
        validate(config)
        assert config.env.name == "maze:umaze"
        assert config.collect.source == "environment"
        assert config.learn.act == "params"
    assert default_config("maze:umaze", "gym").model.normalize


@pytest.mark.parametrize("method", ["valdi-q", "tdmpc2", "mbdpo-tdmpc2"])
def test_critics_learn_from_one_step_also_where_values_learn_from_several(method):
    assert PRESETS["cpu"].learn.td_lambda > 0
    assert default_config("carracing", method).learn.td_lambda == 0


def test_a_part_that_a_configuration_lacks_is_named():
    with pytest.raises(TypeError, match="no field lern"):
        PRESETS["tiny"].replace(lern={"batch_size": 2})


def test_the_authors_mbdpo_is_tdmpc2_with_another_search_and_an_energy():
    theirs, base = (default_config("pendulum", name) for name in ("mbdpo-tdmpc2", "tdmpc2"))
    energy = {"networks": ("q", "policy", "energy")}
    assert theirs.model == dataclasses.replace(base.model, **energy)
    assert (theirs.planner.kind, theirs.planner.answer) == ("mbdpo", "mean")
    assert set(theirs.learn.terms) == {*base.learn.terms, "energy"}
    assert (theirs.env, theirs.collect) == (base.env, base.collect)


def test_valdi_q_has_tdmpc2s_critics_and_search_and_the_tasks_world_model():
    task, ours, theirs = (default_config("pendulum", name) for name in (None, "valdi-q", "tdmpc2"))
    assert (ours.planner, ours.collect) == (theirs.planner, theirs.collect)
    assert ours.model.networks == theirs.model.networks
    assert set(ours.learn.terms) == {*theirs.learn.terms, "sigreg"}
    for name in ("dynamics", "encoder", "latent_dim", "transformer_width", "normalize"):
        assert getattr(ours.model, name) == getattr(task.model, name)
    assert ours.learn.ema_rate == task.learn.ema_rate


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_hashable(preset):
    validate(PRESETS[preset])
    hash(PRESETS[preset])


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        (
            "planner",
            {"elites": 600},
            "--planner.elites is 600; it must be at most --planner.candidates",
        ),
        (
            "planner",
            {"iterations": 0},
            "--planner.iterations is 0; it should be greater than or equal to 1",
        ),
        (
            "planner",
            {"diffusion_steps": 1001},
            "--planner.diffusion-steps is 1001; it must be at most --model.diffusion-timesteps",
        ),
        ("planner", {"action_hold": 2}, "--planner.action-hold is 2; it must divide"),
        (
            "planner",
            {"correlation": 1.5},
            "--planner.correlation is 1.5; it should be less than or equal to 1",
        ),
        (
            "learn",
            {"td_lambda": -0.1},
            "--learn.td-lambda is -0.1; it should be greater than or equal to 0",
        ),
        ("env", {"downsample": 5}, "--env.downsample is 5; it must divide 96"),
        (
            "learn",
            {"batch_size": 0},
            "--learn.batch-size is 0; it should be greater than or equal to 1",
        ),
        (
            "learn",
            {"discount": 1.5},
            "--learn.discount is 1.5; it should be less than or equal to 1",
        ),
        (
            "collect",
            {"num_envs": 0},
            "--collect.num-envs is 0; it should be greater than or equal to 1",
        ),
        (
            "env",
            {"max_steps": 17},
            "--env.max-steps is 17; it must be at least 18",
        ),
        (
            "env",
            {"max_steps": 34, "action_repeat": 2},
            "--env.max-steps is 34; it must be at least 35",
        ),
        (
            "env",
            {"action_repeat": 0},
            "--env.action-repeat is 0; it should be greater than or equal to 1",
        ),
        (
            "eval",
            {"episodes": 101},
            "--eval.episodes is 101; it should be less than or equal to 100",
        ),
        ("env", {"patience": -5}, "--env.patience is -5; it should be greater than or equal to 0"),
        (
            "learn",
            {"ema_rate": 5.0},
            "--learn.ema-rate is 5.0; it should be less than or equal to 1",
        ),
        (
            "learn",
            {"sigreg_knots": 1},
            "--learn.sigreg-knots is 1; it should be greater than or equal to 2",
        ),
        ("collect", {"noise_start": float("nan")}, "--collect.noise-start is nan"),
        ("collect", {"seed_episodes": -3}, "--collect.seed-episodes is -3"),
        ("model", {"transformer_heads": 3}, "must be a multiple of --model.transformer-heads"),
        (
            "model",
            {"transformer_width": 32},
            "--model.transformer-width is 32; it must be at least",
        ),
        ("model", {"cnn_channels": (4, 8)}, "should have at least 5 items"),
    ],
)
def test_values_out_of_range_are_named(section, change, message):
    with pytest.raises(UsageError, match=message):
        validate(PRESETS["paper"].replace(**{section: change}))


def test_a_configuration_is_checked_strictly_on_construction():
    for wrong in ({"batch_size": 8.0}, {"batch_size": "8"}, {"mirror": 1}, {"terms": ["value"]}):
        with pytest.raises(UsageError, match=f"--learn.{next(iter(wrong)).replace('_', '-')} is"):
            PRESETS["paper"].replace(learn=wrong)
    with pytest.raises(TypeError, match="LearnConfig has no field batchsize"):
        PRESETS["paper"].replace(learn={"batchsize": 8})


def test_only_fields_that_affect_compilation_distinguish_graphs():
    paper = PRESETS["paper"]
    for same in ({"eval": {"every": 1}}, {"env": {"patience": 9}}, {"learn": {"devices": 2}}):
        assert paper.replace(**same).graph == paper.graph
    assert dataclasses.replace(paper, seed=3).graph == paper.graph
    for other in (
        {"model": {"horizon": 4}},
        {"planner": {"elites": 9}},
        {"learn": {"discount": 0.9}},
    ):
        assert paper.replace(**other).graph != paper.graph


@pytest.mark.parametrize(
    "change", [{"env": {"downsample": 2}}, {"learn": {"mirror": True}}], ids=["frames", "mirror"]
)
def test_carracings_options_are_refused_elsewhere(change):
    with pytest.raises(UsageError, match="is for carracing alone, not for pendulum"):
        validate(PRESETS["pendulum"].replace(**change))


def test_diffusion_steps_are_for_diffusion():
    mlp = PRESETS["paper"].replace(model={"dynamics": "mlp"})
    with pytest.raises(UsageError, match="does nothing with --model"):
        validate(mlp.replace(planner={"diffusion_steps": 2}))
    with pytest.raises(UsageError, match="futures is 2; it does nothing with"):
        validate(mlp.replace(planner={"futures": 2}))
    flow = PRESETS["paper"].replace(model={"dynamics": "flow"})  # any number: it has no table
    validate(flow.replace(planner={"diffusion_steps": 2000}))


@pytest.mark.parametrize(
    "change", [{"learn": {"terms": ("dynamics",) * 2}}, {"model": {"networks": ("policy",) * 2}}]
)
def test_a_name_is_given_once(change):
    with pytest.raises(UsageError, match=r"names one twice: (dynamics|policy) "):
        validate(PRESETS["paper"].replace(**change))


def test_the_transformer_width_is_not_checked_for_the_mlp():
    narrow = PRESETS["paper"].replace(model={"transformer_width": 32})
    validate(narrow.replace(model={"dynamics": "mlp"}))


def test_the_token_size_is_checked_with_the_environments_action_size(tmp_path):
    # With the three numbers of CarRacing's actions, chunks of 8 would not fit a token.
    config = CONFIG.replace(model={"chunk": 8, "transformer_width": 34}, env={"max_steps": 60})
    with pytest.raises(UsageError, match="must be at least 49"):
        validate(config)
    train(
        config.replace(collect={"episodes": 1}),
        tmp_path / "run",
        make=lambda config, training: gym.make("Pendulum-v1", max_episode_steps=config.max_steps),
        console=Console(file=io.StringIO()),
    )


def test_an_overlapping_run_of_before_lags_by_one_round():
    data = to_dict(Config())
    del data["collect"]["lag"]
    assert from_dict(data | {"collect": data["collect"] | {"overlap": True}}).collect.lag == 1
    assert from_dict(data | {"collect": data["collect"] | {"overlap": False}}).collect.lag == 0
    assert "collect.lag" not in added_since({"collect": {"overlap": True}})
    with pytest.raises(UsageError, match=r"collect.overlap is unknown"):
        from_dict({"collect": {"overlap": 2}})
