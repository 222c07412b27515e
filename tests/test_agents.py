import dataclasses
import errno
import io
import json
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from toy import CONFIG, make_counting

from valdi_jax import checkpoint as command
from valdi_jax import evaluate
from valdi_jax.data.source import Progress
from valdi_jax.envs import interface_of, make_env
from valdi_jax.errors import UsageError
from valdi_jax.observation import Observation
from valdi_jax.presets import PRESETS, default_config
from valdi_jax.run import agents, checkpoint, manifest, rundir, stored
from valdi_jax.train import parse_arguments, train
from valdi_jax.updates import init_state

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
    assert command.main([str(run), "--export", str(tmp_path / "agent")]) == 0
    return tmp_path / "agent"


def test_an_exported_agent_is_the_same_agent(exported, state):
    assert sorted(p.name for p in exported.iterdir()) == ["config.json", "model.safetensors"]
    for path in (exported, exported / "model.safetensors"):
        agent = stored.open_agent(path)
        assert agent.config == NORMALIZED
        chex.assert_trees_all_equal(agent.load(), state.params)
    trained = json.loads((exported / "config.json").read_text())["trained"]
    assert trained == {"episodes": 7, "environment_steps": 70, "updates": 0, "hours": 0.01}


def test_half_precision_halves_the_file_and_leaves_the_statistics(run, exported, tmp_path, state):
    stored.export(run / "checkpoints" / "00000007", tmp_path / "half", half=True)
    size = {p: (p / "model.safetensors").stat().st_size for p in (exported, tmp_path / "half")}
    assert size[tmp_path / "half"] < 0.6 * size[exported]
    params = stored.open_agent(tmp_path / "half").load()
    chex.assert_trees_all_close(params, state.params, rtol=1e-3, atol=1e-6)
    chex.assert_trees_all_equal(params["normalizer"], state.params["normalizer"])
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.booleans())
def test_damage_is_found(exported, name, position, byte, cut):
    path = exported / name
    intact = path.read_bytes()
    position %= len(intact)
    damaged = intact[:position] + (b"" if cut else bytes([byte]) + intact[position + 1 :])
    try:
        path.write_bytes(damaged)
        if damaged != intact:
            with pytest.raises(UsageError, match="is not a whole exported agent"):
                stored.open_agent(exported)
    finally:
        path.write_bytes(intact)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.b": np.ones(2, np.float32), "a.b.c": np.ones(2, np.float32)}, "not a whole"),
        ({"encoder/x": np.ones(2, np.float32)}, "does not fit"),
        ({"a": np.full(2, np.nan, np.float32)}, "does not hold finite numbers"),
        ({"a": np.ones(2, np.int8)}, "does not hold finite numbers"),
    ],
)
def test_tensors_that_are_not_an_agent_are_refused(exported, tensors, message):
    safetensors.numpy.save_file(tensors, exported / "model.safetensors")
    body = manifest.read_signed(exported / "config.json")
    body["tensors_sha256"] = manifest.file_digest(exported / "model.safetensors")
    manifest.write_signed(exported / "config.json", body)
    with pytest.raises(UsageError, match=message):
        stored.open_agent(exported).load(EXAMPLE)


def test_an_agent_older_than_an_option_behaves_as_before(exported):
    body = manifest.read_signed(exported / "config.json")
    del body["config"]["planner"]["warm_start"]
    manifest.write_signed(exported / "config.json", body)
    assert stored.open_agent(exported).config == NORMALIZED
    body["config"]["planner"]["other"] = 1
    manifest.write_signed(exported / "config.json", body)
    with pytest.raises(UsageError, match="other is unknown"):
        stored.open_agent(exported)


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/checkpoints/00000007/manifest.json").write_text("{")
    with pytest.raises(UsageError, match=r"manifest.json cannot be read"):
        stored.export(tmp_path / "run", tmp_path / "agent")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(agents, "write_signed", full)
    with pytest.raises(UsageError, match="No space left on device"):
        stored.export(run, tmp_path / "agent")
    assert not list(tmp_path.iterdir())


def test_an_exported_agent_is_described_and_is_not_a_run(exported, capsys):
    assert command.main([str(exported)]) == 0
    assert "episodes: 7\n" in capsys.readouterr().out
    with pytest.raises(UsageError, match="an agent, not a run: start one with --init-from"):
        parse_arguments(["--resume", str(exported)])
    with pytest.raises(UsageError, match="is an exported agent already"):
        command.main([str(exported), "--export", "other"])


@pytest.mark.parametrize("name", ["a" * 300, "no/where"])
def test_a_missing_path_raises_one_sentence(name):
    with pytest.raises(UsageError):
        stored.open_agent(name)


@pytest.mark.parametrize("directory", [".", "/"])
def test_an_existing_directory_is_refused(run, directory):
    with pytest.raises(UsageError, match="exists already"):
        stored.export(run, Path(directory))


def test_nothing_is_overwritten(run, exported):
    with pytest.raises(UsageError, match="exists already"):
        command.main([str(run), "--export", str(exported)])


def test_a_path_without_an_agent_is_named(tmp_path):
    with pytest.raises(UsageError, match="nowhere is not a run directory, nor an agent"):
        stored.open_agent(tmp_path / "nowhere")


def go(directory, config=NORMALIZED, **options):
    config = config.replace(collect={"episodes": 1, "seed_episodes": 1})  # nothing is learnt
    console = Console(file=io.StringIO())
    return train(config, directory, make=make_counting, console=console, **options)


@pytest.mark.parametrize("source", ["run", "exported"])
def test_a_run_starts_from_the_parameters_of_another(request, source, tmp_path, state):
    after = go(tmp_path / "new", init_from=request.getfixturevalue(source))
    for part in ("encoder", "dynamics", "reward", "value"):
        chex.assert_trees_all_equal(after.params[part], state.params[part])
        chex.assert_trees_all_equal(after.ema_params[part], state.params[part])
    assert after.step == 0


def test_a_run_killed_at_once_keeps_its_initial_parameters(run, tmp_path, state, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "recover", killed)  # the first that is done in a run
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "new", init_from=run)
    after = go(tmp_path / "new", resume=True)
    chex.assert_trees_all_equal(after.params["encoder"], state.params["encoder"])


def test_a_directory_without_its_configuration_is_not_a_run(run, tmp_path, state, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "save_config", killed)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "new", init_from=run)
    with pytest.raises(UsageError, match="is not a run directory"):
        go(tmp_path / "new", resume=True)
    after = go(tmp_path / "new", init_from=run)
    chex.assert_trees_all_equal(after.params["encoder"], state.params["encoder"])


def test_resume_and_init_from_exclude_each_other(run):
    with pytest.raises(UsageError, match="init_from is for a new one"):
        go(run, init_from=run, resume=True)


def test_a_parameter_that_does_not_fit_is_named_and_nothing_is_made(run, tmp_path):
    wider = NORMALIZED.replace(model={"value_width": 64})
    with pytest.raises(UsageError, match=r"value/head_0/linear_0/dense/bias is \(32,\) there"):
        go(tmp_path / "new", wider, init_from=run)
    assert not (tmp_path / "new").exists()


def test_an_agent_of_another_task_is_named(run, tmp_path):
    other = NORMALIZED.replace(model={"value_width": 64}, env={"name": "other"})
    with pytest.raises(UsageError, match=r"is of toy, with --model\.value-width 32"):
        go(tmp_path / "new", other, init_from=run)


def test_settings_of_another_task_are_named():
    with pytest.raises(UsageError, match="carracing is of carracing, and its settings hold"):
        parse_arguments(["--init-from", "carracing", "--env", "pendulum"])


def test_init_from_brings_its_settings_unless_a_preset_is_given(run):
    arguments = parse_arguments(["--init-from", str(run), "--seed", "3"])
    assert arguments.config == dataclasses.replace(NORMALIZED, seed=3)
    arguments = parse_arguments(["--init-from", str(run), "--preset", "cpu"])
    assert arguments.config == default_config("toy", "cpu")
    assert arguments.config.planner == PRESETS["cpu"].planner
    arguments = parse_arguments(["--init-from", "pendulum", "--preset", "mbdpo"])
    assert arguments.config == default_config("pendulum", "mbdpo")
    with pytest.raises(UsageError, match="exclude each other"):
        parse_arguments(["--init-from", str(run), "--resume", str(run)])


def test_the_bundled_agents_are_intact_and_small():
    size = 0
    assert {"carracing", "carracing-mlp"} <= set(agents.packaged())
    for name in agents.packaged():
        agent = stored.open_agent(Path(name))
        interface = interface_of(lambda env=agent.config.env: make_env(env, training=False))
        agent.load(interface.example)
        size += (agents._PACKAGED / name / agents.TENSORS).stat().st_size
    assert size < 20e6


def test_their_card_is_of_the_agents_that_are_there():
    lines = (agents._PACKAGED / "README.md").read_text().splitlines()
    rows = {line.split("`")[1]: line for line in lines if line.startswith("| `")}
    assert rows.keys() == set(agents.packaged())
    for name, row in rows.items():
        record = json.loads((agents._PACKAGED / name / "config.json").read_text())["trained"]
        assert f"| {record['episodes']} |" in row
        if "score" in record:
            mean, error = (float(part.split()[0]) for part in record["score"].split("+-"))
            digits = 0 if error >= 1 else 1
            assert f"| {mean:.{digits}f} ± {error:.{digits}f}, " in row


def test_an_exported_agent_acts_like_its_run(tmp_path):
    config = PRESETS["tiny"]
    example = Observation(image=np.zeros((96, 96, 3), np.uint8), vector=np.zeros(7, np.float32))
    state = init_state(jax.random.key(0), example, config=config)
    checkpoint.create_run(tmp_path / "run", config)
    checkpoint.save(tmp_path / "run", state, Progress(), keep=1, replay={})
    stored.export(tmp_path / "run", tmp_path / "agent")
    results = []
    for name in ("run", "agent"):
        out = tmp_path / f"{name}.json"
        evaluate.main([str(tmp_path / name), "--episodes", "1", "--json", str(out)])
        results.append(json.loads(out.read_text())["results"][0]["episodes"])
    assert results[0] == results[1]
