import dataclasses
import io
import json
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from rich.console import Console
from toy import CONFIG, Counting, make_counting

from valdi_jax import agents, checkpoint, evaluate
from valdi_jax.checkpoint import Progress
from valdi_jax.config import PRESETS
from valdi_jax.envs import interface_of, make_env
from valdi_jax.errors import UsageError
from valdi_jax.train import parse_arguments, train
from valdi_jax.types import Observation
from valdi_jax.update import init_state

EXAMPLE = Observation(vector=np.zeros(2, np.float32))
NORMALIZED = CONFIG.replace(model={"normalize": True})


@pytest.fixture(scope="module")
def state():
    return init_state(jax.random.key(4), EXAMPLE, config=NORMALIZED)


@pytest.fixture(scope="module")
def run(tmp_path_factory, state):
    directory = tmp_path_factory.mktemp("runs") / "run"
    checkpoint.create_run(directory, NORMALIZED)
    progress = Progress(episodes=7, env_steps=70, learning_steps=50, seconds=36.0)
    checkpoint.save(directory, state, progress, keep=2, replay={})
    return directory


@pytest.fixture
def exported(run, tmp_path):
    assert checkpoint.main([str(run), "--export", str(tmp_path / "agent")]) == 0
    return tmp_path / "agent"


def test_an_exported_agent_is_the_same_agent(exported, state):
    assert sorted(p.name for p in exported.iterdir()) == ["config.json", "model.safetensors"]
    for path in (exported, exported / "model.safetensors"):
        agent = checkpoint.open_agent(path)
        assert agent.config == NORMALIZED
        chex.assert_trees_all_equal(agent.load(), state.params)
    trained = json.loads((exported / "config.json").read_text())["trained"]
    assert trained == {"episodes": 7, "environment_steps": 70, "updates": 0, "hours": 0.01}


def test_half_precision_halves_the_file_and_leaves_the_statistics(run, exported, tmp_path, state):
    checkpoint.export(run / "checkpoints" / "00000007", tmp_path / "half", half=True)
    size = {p: (p / "model.safetensors").stat().st_size for p in (exported, tmp_path / "half")}
    assert size[tmp_path / "half"] < 0.6 * size[exported]
    params = checkpoint.open_agent(tmp_path / "half").load()
    chex.assert_trees_all_close(params, state.params, rtol=1e-3, atol=1e-6)
    chex.assert_trees_all_equal(params["normalizer"], state.params["normalizer"])
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_every_flipped_bit_is_found(exported, name):
    path = exported / name
    intact = bytearray(path.read_bytes())
    for position in np.random.default_rng(0).integers(len(intact), size=20):
        damaged = intact.copy()
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="is not a whole exported agent"):
            checkpoint.open_agent(exported)


def test_nothing_is_written_over(run, exported):
    with pytest.raises(UsageError, match="exists already"):
        checkpoint.main([str(run), "--export", str(exported)])


def test_what_is_no_agent_is_named(tmp_path):
    with pytest.raises(UsageError, match="nowhere is not a run directory, nor an agent"):
        checkpoint.open_agent(tmp_path / "nowhere")


def go(directory, config=NORMALIZED, **settings):
    output = io.StringIO()
    settings = {"make": make_counting, "console": Console(file=output)} | settings
    return train(config.replace(collect={"episodes": 1}), directory, **settings)


@pytest.mark.parametrize("source", ["run", "exported"])
def test_a_run_starts_from_the_parameters_of_another(request, source, tmp_path, state):
    fresh = NORMALIZED.replace(collect={"seed_episodes": 1})  # so nothing is learnt
    after = go(tmp_path / "new", fresh, init_from=request.getfixturevalue(source))
    for part in ("encoder", "dynamics", "reward", "value"):
        chex.assert_trees_all_equal(after.params[part], state.params[part])
        chex.assert_trees_all_equal(after.ema_params[part], state.params[part])
    assert after.step == 0


def test_a_run_that_is_killed_at_once_keeps_them(run, tmp_path, state):
    kept = []

    class Watched(Counting):
        def reset(self, **kwargs):
            found = checkpoint.latest(tmp_path / "new")
            kept.append((found.name, checkpoint.read_params(found)))
            return super().reset(**kwargs)

    go(tmp_path / "new", init_from=run, make=lambda config, training: Watched())
    name, params = kept[0]  # of the checkpoint that there is before the first step
    assert name == "00000000"
    chex.assert_trees_all_equal(params["encoder"], state.params["encoder"])


def test_what_does_not_fit_is_named_and_nothing_is_made(run, tmp_path):
    wider = NORMALIZED.replace(model={"value_width": 64})
    with pytest.raises(UsageError, match=r"value/head_0/linear_0/dense/bias is \(32,\) there"):
        go(tmp_path / "new", wider, init_from=run)
    assert not (tmp_path / "new").exists()


def test_its_settings_come_along_unless_a_preset_is_given(run):
    arguments = parse_arguments(["--init-from", str(run), "--seed", "3"])
    assert arguments.config == dataclasses.replace(NORMALIZED, seed=3)
    arguments = parse_arguments(["--init-from", str(run), "--preset", "cpu"])
    assert arguments.config == PRESETS["cpu"]
    with pytest.raises(UsageError, match="exclude each other"):
        parse_arguments(["--init-from", str(run), "--resume", str(run)])


def test_the_agents_in_the_package_are_whole_and_small():
    size = 0
    for name in agents.packaged():
        agent = checkpoint.open_agent(Path(name))
        interface = interface_of(lambda env=agent.config.env: make_env(env, training=False))
        checkpoint.fitting(agent.load(), interface.example, agent.config, name)
        size += (agents._PACKAGED / name / agents.TENSORS).stat().st_size
    assert size < 20e6


def test_an_exported_agent_drives_like_its_run(tmp_path):
    config = PRESETS["tiny"]
    example = Observation(image=np.zeros((96, 96, 3), np.uint8), vector=np.zeros(7, np.float32))
    state = init_state(jax.random.key(0), example, config=config)
    checkpoint.create_run(tmp_path / "run", config)
    checkpoint.save(tmp_path / "run", state, Progress(), keep=1, replay={})
    checkpoint.export(tmp_path / "run", tmp_path / "agent")
    results = []
    for name in ("run", "agent"):
        out = tmp_path / f"{name}.json"
        evaluate.main([str(tmp_path / name), "--episodes", "1", "--json", str(out)])
        results.append(json.loads(out.read_text())["results"][0]["episodes"])
    assert results[0] == results[1]
