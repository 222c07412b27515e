import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
from test_replay import episode
from toy import CONFIG

from valdi_jax import checkpoint
from valdi_jax.checkpoint import Progress
from valdi_jax.config import PRESETS, to_dict
from valdi_jax.errors import UsageError
from valdi_jax.types import Observation
from valdi_jax.update import init_state

EXAMPLE = Observation(vector=np.zeros(2, np.float32))


@pytest.fixture
def run(tmp_path):
    directory = tmp_path / "run"
    checkpoint.create_run(directory, CONFIG)
    return directory


@pytest.fixture(scope="module")
def state():
    return init_state(jax.random.key(4), EXAMPLE, config=CONFIG)


def test_a_checkpoint_holds_everything_exactly(run, state):
    progress = Progress(episodes=7, env_steps=70, learning_steps=50, seconds=1.5)
    path = checkpoint.save(run, state, progress, keep=2)
    restored, counters = checkpoint.load(path, EXAMPLE, CONFIG)
    assert counters == progress
    chex.assert_trees_all_equal(restored.params, state.params)
    chex.assert_trees_all_equal(restored.ema_params, state.ema_params)
    chex.assert_trees_all_equal(restored.optimizer, state.optimizer)
    assert restored.step == state.step
    assert restored.key == state.key
    chex.assert_trees_all_equal(checkpoint.load_params(path, EXAMPLE, CONFIG), state.params)


def test_only_the_newest_checkpoints_are_kept(run, state):
    for episodes in (1, 2, 3):
        checkpoint.save(run, state, Progress(episodes=episodes), keep=2)
    assert [p.name for p in checkpoint.checkpoints(run)] == ["00000002", "00000003"]
    assert checkpoint.latest(run).name == "00000003"


def test_an_unfinished_checkpoint_does_not_count_and_is_swept_away(run, state):
    checkpoint.save(run, state, Progress(episodes=1), keep=2)
    (run / "checkpoints" / "partial-00000002").mkdir()
    assert checkpoint.latest(run).name == "00000001"
    checkpoint.save(run, state, Progress(episodes=3), keep=2)
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["00000001", "00000003"]


def test_a_checkpoint_can_be_written_again(run, state):
    for seconds in (1.0, 2.0):
        path = checkpoint.save(run, state, Progress(episodes=1, seconds=seconds), keep=1)
    assert checkpoint.load(path, EXAMPLE, CONFIG)[1].seconds == 2.0
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["00000001"]


def test_damaged_counters_are_refused_by_name(run, state):
    path = checkpoint.save(run, state, Progress(episodes=1), keep=2)
    for content in ("", "{}", "[]", '{"episodes": "x"}'):
        (path / "progress.json").write_text(content)
        with pytest.raises(UsageError, match=r"cannot read .*progress\.json"):
            checkpoint.load(path, EXAMPLE, CONFIG)


def test_a_checkpoint_of_other_shapes_is_refused_by_name(run, state):
    path = checkpoint.save(run, state, Progress(episodes=1), keep=2)
    for change in ({"latent_dim": 24}, {"dynamics": "mlp"}, {"transformer_depth": 2}):
        other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **change))
        with pytest.raises(UsageError, match=r"does not fit this configuration: \w+/"):
            checkpoint.load_params(path, EXAMPLE, other)


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is not a run directory"):
        checkpoint.load_config(tmp_path)


def test_a_run_is_never_overwritten(run):
    with pytest.raises(UsageError, match=f"already holds a run.*--resume {run}"):
        checkpoint.create_run(run, CONFIG)


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write to"):
        checkpoint.create_run(tmp_path / "file" / "run", CONFIG)


def test_a_run_without_checkpoints_says_so(run):
    with pytest.raises(UsageError, match="holds no checkpoint yet"):
        checkpoint.latest(run)


@pytest.mark.parametrize("preset", PRESETS)
def test_configurations_survive_the_round_trip(tmp_path, preset):
    checkpoint.create_run(tmp_path / preset, PRESETS[preset])
    assert checkpoint.load_config(tmp_path / preset) == PRESETS[preset]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["model"].update(latent=3), "field model.latent is unknown"),
        (lambda d: d["model"].pop("horizon"), "field model.horizon is missing"),
        (lambda d: d["learn"].update(batch_size="many"), "field learn.batch_size cannot be 'many'"),
        (lambda d: d["learn"].update(batch_size=True), "field learn.batch_size cannot be True"),
        (lambda d: d["model"].update(dynamics="flow"), "field model.dynamics cannot be 'flow'"),
        (lambda d: d.update(env=3), "env. must be an object"),
    ],
)
def test_a_configuration_file_is_read_strictly(run, edit, message):
    data = to_dict(CONFIG)
    edit(data)
    (run / "config.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match=message):
        checkpoint.load_config(run)


def test_a_configuration_file_that_is_not_json_is_refused(run):
    (run / "config.json").write_text("{")
    with pytest.raises(UsageError, match="not a valid configuration"):
        checkpoint.load_config(run)


def test_an_episode_survives_the_round_trip(run):
    original = episode(3, 20, terminated=True)
    checkpoint.save_episode(run, 3, original)
    restored = checkpoint.load_episode(run, 3)
    assert restored.observations.image is None
    np.testing.assert_array_equal(restored.observations.vector, original.observations.vector)
    np.testing.assert_array_equal(restored.actions, original.actions)
    np.testing.assert_array_equal(restored.rewards, original.rewards)
    assert (restored.terminated, restored.truncated, restored.seed) == (True, False, 3)


def test_a_damaged_episode_is_refused_by_name(run):
    checkpoint.save_episode(run, 3, episode(3, 20))
    path = run / "replay" / "00000003.npz"
    intact = path.read_bytes()
    damaged = [intact[:-30], b"", intact[:100] + bytes([intact[100] ^ 255]) + intact[101:]]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"cannot read the episode .*00000003\.npz"):
            checkpoint.load_episode(run, 3)


def test_old_episodes_are_pruned(run):
    for number in range(4):
        checkpoint.save_episode(run, number, episode(number, 20))
    checkpoint.prune_episodes(run, before=2)
    assert sorted(p.name for p in (run / "replay").iterdir()) == ["00000002.npz", "00000003.npz"]
