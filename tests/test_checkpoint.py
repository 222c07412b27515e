import dataclasses
import io
import json
import os
import shutil
import zipfile

import chex
import jax
import numpy as np
import pytest
from test_replay import episode
from toy import CONFIG

from valdi_jax import checkpoint as command
from valdi_jax.config import to_dict
from valdi_jax.data.source import Progress
from valdi_jax.errors import UsageError
from valdi_jax.observation import Observation
from valdi_jax.presets import PRESETS
from valdi_jax.run import checkpoint, npz, rundir
from valdi_jax.updates import init_state

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
    path = checkpoint.save(run, state, progress, keep=2, replay={})
    restored, counters = checkpoint.load(path, EXAMPLE, CONFIG)
    assert counters == progress
    chex.assert_trees_all_equal(restored.params, state.params)
    chex.assert_trees_all_equal(restored.ema_params, state.ema_params)
    chex.assert_trees_all_equal(restored.optimizer, state.optimizer)
    assert restored.step == state.step
    assert restored.key == state.key
    chex.assert_trees_all_equal(checkpoint.load_params(path, EXAMPLE, CONFIG), state.params)


def test_who_acts_with_an_average_is_evaluated_with_it(run):
    config = CONFIG.replace(learn={"average": 0.1})
    state = init_state(jax.random.key(4), EXAMPLE, config=config)
    state = state.replace(average=jax.tree.map(lambda x: x + 1, state.average))
    path = checkpoint.save(run, state, Progress(episodes=7), keep=2, replay={})
    restored, _ = checkpoint.load(path, EXAMPLE, config)
    chex.assert_trees_all_equal(restored.params, state.params)
    chex.assert_trees_all_equal(restored.average, state.average)
    chex.assert_trees_all_equal(checkpoint.load_params(path, EXAMPLE, config), state.average)
    without, _ = checkpoint.load(path, EXAMPLE, CONFIG)  # the option was switched off
    assert without.average is None
    chex.assert_trees_all_equal(without.params, state.params)
    path = checkpoint.save(run, without, Progress(episodes=8), keep=2, replay={})
    again, _ = checkpoint.load(path, EXAMPLE, config)
    chex.assert_trees_all_equal(again.average, state.params)


def test_only_the_newest_checkpoints_are_kept(run, state):
    for episodes in (1, 2, 3):
        checkpoint.save(run, state, Progress(episodes=episodes), keep=2, replay={})
    assert [p.name for p in rundir.checkpoints(run)] == ["00000002", "00000003"]
    assert rundir.latest(run).name == "00000003"


def test_an_unfinished_checkpoint_is_ignored_and_deleted(run, state):
    checkpoint.save(run, state, Progress(episodes=1), keep=2, replay={})
    (run / "checkpoints" / "partial-00000002").mkdir()
    assert rundir.latest(run).name == "00000001"
    checkpoint.save(run, state, Progress(episodes=3), keep=2, replay={})
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["00000001", "00000003"]


def test_a_checkpoint_can_be_written_again(run, state):
    for seconds in (1.0, 2.0):
        path = checkpoint.save(run, state, Progress(episodes=1, seconds=seconds), keep=1, replay={})
    assert checkpoint.load(path, EXAMPLE, CONFIG)[1].seconds == 2.0
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["00000001"]


def test_damaged_counters_are_refused_by_name(run, state):
    path = checkpoint.save(run, state, Progress(episodes=1), keep=2, replay={})
    for content in ("", "{}", "[]", '{"episodes": "x"}'):
        (path / "progress.json").write_text(content)
        with pytest.raises(UsageError, match=r"cannot read .*progress\.json"):
            checkpoint.load(path, EXAMPLE, CONFIG)


def test_a_checkpoint_of_other_shapes_is_refused_by_name(run, state):
    path = checkpoint.save(run, state, Progress(episodes=1), keep=2, replay={})
    for change in ({"latent_dim": 24}, {"dynamics": "mlp"}, {"transformer_depth": 2}):
        other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **change))
        with pytest.raises(UsageError, match=r"does not fit this configuration: \w+/"):
            checkpoint.load_params(path, EXAMPLE, other)


def test_a_directory_that_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is not a run directory"):
        rundir.load_config(tmp_path)


def test_a_run_is_never_overwritten(run):
    with pytest.raises(UsageError, match=f"already holds a run.*--resume {run}"):
        checkpoint.create_run(run, CONFIG)


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write to"):
        checkpoint.create_run(tmp_path / "file" / "run", CONFIG)


def test_a_run_without_checkpoints_says_so(run):
    with pytest.raises(UsageError, match=r"is not a checkpoint: latest\(RUN\)"):
        checkpoint.load_params(str(run), EXAMPLE, CONFIG)
    with pytest.raises(UsageError, match="holds no checkpoint yet"):
        rundir.latest(run)


@pytest.mark.parametrize("preset", PRESETS)
def test_configurations_survive_the_round_trip(tmp_path, preset):
    checkpoint.create_run(tmp_path / preset, PRESETS[preset])
    assert rundir.load_config(tmp_path / preset) == PRESETS[preset]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["model"].update(latent=3), "field model.latent is unknown"),
        (
            lambda d: d["learn"].update(batch_size="many"),
            "field learn.batch_size is 'many'; it should be",
        ),
        (
            lambda d: d["learn"].update(batch_size=True),
            "field learn.batch_size is True; it should be",
        ),
        (lambda d: d["planner"].update(answer="worst"), "field planner.answer is 'worst'"),
        (lambda d: d["learn"].update(batch_size=0), "field learn.batch_size is 0; it should be"),
        (lambda d: d.update(env=3), "field env is 3; it should be an object"),
    ],
)
def test_a_configuration_file_is_read_strictly(run, edit, message):
    data = to_dict(CONFIG)
    edit(data)
    (run / "config.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match=message):
        rundir.load_config(run)


def test_a_run_older_than_an_option_behaves_as_before(run):
    data = to_dict(CONFIG)
    (run / "run.json").unlink()
    del data["learn"]["td_lambda"], data["planner"]["kind"], data["planner"]["icem"]
    (run / "config.json").write_text(json.dumps(data))
    assert rundir.load_config(run) == CONFIG
    new = ["planner.kind", "planner.icem", "learn.td_lambda"]
    assert rundir.options_since(run) == new


def test_a_configuration_file_that_is_not_json_is_refused(run):
    (run / "config.json").write_text("{")
    with pytest.raises(UsageError, match="not a valid configuration"):
        rundir.load_config(run)


def test_an_episode_survives_the_round_trip(run):
    original = episode(3, 20, terminated=True)
    npz.save_episode(run, 3, original)
    restored = npz.load_episode(run, 3, EXAMPLE, CONFIG)
    assert restored.observations.image is None
    np.testing.assert_array_equal(restored.observations.vector, original.observations.vector)
    np.testing.assert_array_equal(restored.actions, original.actions)
    np.testing.assert_array_equal(restored.rewards, original.rewards)
    assert (restored.terminated, restored.truncated, restored.seed) == (True, False, 3)


class Malicious:
    def __reduce__(self):
        return (print, ("a pickle was executed",))


def pickled(tmp_path):
    """An .npz file that holds a pickle."""
    np.savez(tmp_path / "pickle.npz", rewards=np.array([Malicious()], dtype=object))
    return (tmp_path / "pickle.npz").read_bytes()


def test_an_episode_of_another_environment_is_refused(run):
    npz.save_episode(run, 3, episode(3, 20))
    for example, config in (
        (Observation(vector=np.zeros(5, np.float32)), CONFIG),
        (EXAMPLE._replace(image=np.zeros((8, 8, 3), np.uint8)), CONFIG),
        (EXAMPLE, CONFIG.replace(model={"action_dim": 2})),
    ):
        with pytest.raises(UsageError, match=r"cannot read the episode .*00000003\.npz.*it holds"):
            npz.load_episode(run, 3, example, config)


def test_a_header_larger_than_its_data_is_refused_before_allocation(run):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (2**40,)}
    )
    (run / "replay").mkdir()
    with zipfile.ZipFile(run / "replay" / "00000003.npz", "w") as file:
        file.writestr("rewards.npy", header.getvalue())
    with pytest.raises(UsageError, match="not the array that it says it is"):
        npz.load_episode(run, 3, EXAMPLE, CONFIG)


def test_equal_episodes_give_equal_files(run):
    digests = {npz.save_episode(run, number, episode(0, 20)) for number in (1, 2)}
    assert len(digests) == 1
    assert digests != {npz.save_episode(run, 3, episode(1, 20))}


def test_a_damaged_episode_is_refused_by_name(run):
    npz.save_episode(run, 3, episode(3, 20))
    path = run / "replay" / "00000003.npz"
    intact = path.read_bytes()
    damaged = [intact[:-30], b"", intact[:100] + bytes([intact[100] ^ 255]) + intact[101:]]
    damaged.append(pickled(tmp_path=run))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"cannot read the episode .*00000003\.npz"):
            npz.load_episode(run, 3, EXAMPLE, CONFIG)


def test_old_episodes_are_pruned(run):
    for number in range(4):
        npz.save_episode(run, number, episode(number, 20))
    npz.prune_episodes(run, before=2)
    assert sorted(p.name for p in (run / "replay").iterdir()) == ["00000002.npz", "00000003.npz"]


@pytest.fixture
def driven(run, state):
    """A run with three episodes, and checkpoints after two and after three."""
    digests = {n: npz.save_episode(run, n, episode(n, 20)) for n in range(2)}
    checkpoint.save(run, state, Progress(episodes=2), keep=2, replay=digests)
    digests[2] = npz.save_episode(run, 2, episode(2, 20))
    checkpoint.save(run, state, Progress(episodes=3), keep=2, replay=digests)
    return run


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_an_intact_run_resumes_from_its_newest_checkpoint(driven):
    used, digests, sentences = checkpoint.recover(driven)
    assert used.name == "00000003"
    assert list(digests) == [0, 1, 2]
    assert sentences == []
    assert command.main([str(driven)]) == 0


def test_a_checkpoint_half_replaced_by_a_kill_is_not_lost(driven):
    newest = driven / "checkpoints" / "00000003"
    newest.rename(newest.with_name("replaced-00000003"))
    shutil.copytree(newest.with_name("replaced-00000003"), newest.with_name("partial-00000003"))
    assert checkpoint.recover(driven)[0] == newest
    assert checkpoint.verify(newest) == []


def test_damage_to_any_file_of_a_checkpoint_is_found_by_name(driven):
    newest = driven / "checkpoints" / "00000003"
    rng = np.random.default_rng(0)
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        intact = path.read_bytes()
        for damage in ("flipped", "cut", "missing"):
            if damage == "flipped" and intact:
                flip(path, rng.integers(len(intact)))
            elif damage == "cut":
                path.write_bytes(intact[:-1])
            else:
                path.unlink()
            if intact or damage == "missing":
                assert any(str(path) in sentence for sentence in checkpoint.verify(newest)), path
            path.write_bytes(intact)
    (newest / "params" / ".DS_Store").write_text("")
    assert checkpoint.verify(newest) == [], "what others leave there is no damage"


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(driven, capsys):
    flip(next((driven / "checkpoints/00000003/params").rglob("d/*")), 7)
    assert command.main([str(driven)]) == 1
    output = capsys.readouterr().out
    assert "damaged" in output
    assert "differs from its checksum" in output
    used, digests, sentences = checkpoint.recover(driven)
    assert used.name == "00000002"
    assert list(digests) == [0, 1]
    assert any("00000003/params" in sentence for sentence in sentences)
    assert (driven / "checkpoints" / "damaged-00000003").is_dir()
    assert checkpoint.recover(driven)[2] == []


def test_a_damaged_episode_is_set_aside_for_a_checkpoint_without_it(driven):
    flip(driven / "replay/00000002.npz", 50)
    used, digests, sentences = checkpoint.recover(driven)
    assert used.name == "00000002"
    assert list(digests) == [0, 1]
    assert any("replay/00000002.npz differs" in sentence for sentence in sentences)
    assert (driven / "replay" / "damaged-00000002.npz").is_file()


def test_an_episode_that_every_checkpoint_needs_is_left_out_and_reported(driven):
    (driven / "replay/00000000.npz").unlink()
    used, digests, sentences = checkpoint.recover(driven)
    assert used.name == "00000003"
    assert list(digests) == [1, 2]
    assert any("replay/00000000.npz is missing" in sentence for sentence in sentences)
    assert "going on without 1 damaged episodes" in sentences


def test_a_run_without_an_intact_checkpoint_is_refused(driven):
    for number in (2, 3):
        (driven / f"checkpoints/{number:08d}/manifest.json").write_text("{}")
    with pytest.raises(UsageError, match=r"no checkpoint of .* is whole"):
        checkpoint.recover(driven)


def test_equal_states_have_equal_contents(tmp_path, state):
    contents = []
    for name, seconds, digest in (("a", 1.0, "x"), ("b", 2.0, "x"), ("c", 1.0, "y")):
        checkpoint.create_run(tmp_path / name, CONFIG)
        path = checkpoint.save(
            tmp_path / name, state, Progress(1, seconds=seconds), keep=1, replay={0: digest}
        )
        contents.append(json.loads((path / "manifest.json").read_text())["content"])
    assert contents[0] == contents[1] != contents[2]


def test_a_run_directory_serves_one_process(run):
    with rundir.lock(run):
        message = f"in use by the process {os.getpid()}"
        with pytest.raises(UsageError, match=message), rundir.lock(run):
            pass
    with rundir.lock(run):
        pass
