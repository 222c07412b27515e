import dataclasses
import errno
import functools
import io
import itertools
import os
import signal
import struct
import sys
import types
from pathlib import Path

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event
from toy import CONFIG, make_counting

from valdi_jax import cli
from valdi_jax.data import source as source_module
from valdi_jax.data.replay import Replay
from valdi_jax.data.source import Environments
from valdi_jax.envs import make_env
from valdi_jax.errors import StoppedError, UsageError
from valdi_jax.presets import PRESETS
from valdi_jax.run import checkpoint, loop, npz, rundir, wandb
from valdi_jax.run import learner as learner_module
from valdi_jax.run.log import read_jsonl
from valdi_jax.train import main, parse_arguments, train


def run(directory, episodes, resume=False, config=CONFIG, make=make_counting):
    config = dataclasses.replace(
        config, collect=dataclasses.replace(config.collect, episodes=episodes)
    )
    output = io.StringIO()
    state = train(config, directory, resume=resume, make=make, console=Console(file=output))
    return state, output.getvalue()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "straight"
    return directory, *run(directory, 5)


def test_a_run_leaves_everything_in_its_directory(straight):
    directory, _, output = straight
    assert rundir.load_config(directory).collect.episodes == 5
    assert [p.name for p in rundir.checkpoints(directory)] == ["00000003", "00000005"]
    assert len(list((directory / "replay").glob("*.npz"))) == 5
    assert list(directory.glob("events.out.tfevents*"))
    records = read_jsonl(directory / "metrics.jsonl")
    assert [r["episode"] for r in records] == [0, 1, 2, 3, 4]
    assert all(r["episode/return"] == 465 for r in records)
    assert "loss/total" not in records[1]
    assert np.isfinite(records[-1]["loss/total"])
    assert "episode 5/5" in output


def read_events(path):
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def events(directory):
    """The values in TensorBoard's files of a directory: tag -> {step: value}."""
    found = {}
    for path in sorted(directory.glob("events.out.tfevents*")):
        for event in read_events(path):
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value
    return found


def test_tensorboard_has_both_axes_the_options_and_the_video(tmp_path, monkeypatch):
    config = CONFIG.replace(eval={"every": 2, "episodes": 1, "video": True})

    def film(params, config, path, *, make, on_decision):
        path.write_bytes(b"GIF89a" + struct.pack("<HH", 6, 4))

    monkeypatch.setattr(loop, "record_video", film)
    run(tmp_path / "run", 2, config=config)
    seen = events(tmp_path / "run")
    assert seen["eval/video"][1].image.width == 6
    assert seen["episode/return"].keys() == {0, 1}
    assert "_hparams_/session_start_info" in seen
    by_step = events(tmp_path / "run" / "env_steps")
    assert by_step["env_steps/episode/return"].keys() == {30, 60}
    assert by_step["env_steps/eval/return"].keys() == {60}


def test_tensorboard_keeps_what_a_resumed_run_does_not_write_again(tmp_path):
    config = CONFIG.replace(eval={"every": 0})
    run(tmp_path / "run", 2, config=config)
    run(tmp_path / "run", 3, config=config, resume=True)
    for directory, kept in ((tmp_path / "run", 1), (tmp_path / "run" / "env_steps", 60)):
        files = sorted(directory.glob("events.out.tfevents*"), key=os.path.getmtime)
        starts = [event.step for event in read_events(files[-1]) if event.HasField("session_log")]
        assert starts == [kept + 1]  # TensorBoard drops this step and later ones


def test_a_program_gets_every_record_as_it_is_written(tmp_path):
    seen = []
    config = CONFIG.replace(collect={"episodes": 4})
    train(
        config,
        tmp_path / "run",
        make=make_counting,
        console=Console(quiet=True),
        on_record=lambda record: seen.append(record),
    )
    for name, key in (("metrics", "episode/return"), ("evaluations", "eval/return")):
        written = read_jsonl(tmp_path / "run" / f"{name}.jsonl")
        assert [record for record in seen if key in record] == written


def test_records_go_to_weights_and_biases(tmp_path, monkeypatch):
    sent = []

    class Run:
        def __init__(self, **settings):
            self.settings = settings

        def define_metric(self, *names, **settings):
            pass

        log = staticmethod(sent.append)

        def finish(self, exit_code):
            sent.append((self.settings["id"], exit_code))

    monkeypatch.setattr(wandb.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"valdi-jax\[wandb\]"):
        main(["--env", "pendulum", "--log", "wandb", "--run-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(wandb.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Run))
    config = CONFIG.replace(collect={"episodes": 2}, eval={"every": 0})
    with wandb.WandB(tmp_path / "run", config) as on_record:
        train(
            config,
            tmp_path / "run",
            make=make_counting,
            console=Console(quiet=True),
            on_record=on_record,
        )
    *records, end = sent
    assert [record["episode"] for record in records] == [0, 1]
    assert end == (rundir.identity(tmp_path / "run")["id"], 0)


def test_a_video_that_cannot_be_recorded_costs_no_training(tmp_path):
    config = CONFIG.replace(eval={"every": 1, "episodes": 1, "video": True})
    _, output = run(tmp_path / "run", 1, config=config)  # the environment has no render mode
    assert "no video" in output


def test_a_run_that_ends_before_its_first_update_says_so(tmp_path):
    config = CONFIG.replace(collect={"seed_episodes": 2})
    assert "2 episodes end before the first update" in run(tmp_path / "few", 2, config=config)[1]
    assert "before the first" not in run(tmp_path / "enough", 3, config=config)[1]


def test_every_metric_is_explained(straight):
    explained = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    for name in ("metrics", "evaluations"):
        *_, record = read_jsonl(straight[0] / f"{name}.jsonl")
        assert len(record) > 3
        for key in record:
            assert "/" not in key or f"`{key}`" in explained, key


def test_every_episode_has_its_own_randomness(tmp_path, monkeypatch):
    jobs, job = [], Environments._job

    def recording(self, number):
        jobs.append(job(self, number))
        return jobs[-1]

    monkeypatch.setattr(Environments, "_job", recording)
    run(tmp_path / "run", 4)
    assert len({job.seed for job in jobs}) == 4
    assert len({tuple(jax.random.key_data(job.key).tolist()) for job in jobs}) == 4


def test_the_update_to_data_ratio_is_exact(straight):
    directory, state, _ = straight
    records = read_jsonl(directory / "metrics.jsonl")
    # 30 steps per episode, a tenth of an update each, none for the two seed episodes.
    assert [r["total/updates"] for r in records] == [0, 0, 3, 6, 9]
    assert int(state.step) == 9


def test_a_resumed_run_equals_a_straight_one(straight, tmp_path):
    _, state, _ = straight
    run(tmp_path / "run", 3)
    resumed, _ = run(tmp_path / "run", 5, resume=True)
    chex.assert_trees_all_equal(resumed.params, state.params)
    chex.assert_trees_all_equal(resumed.ema_params, state.ema_params)
    chex.assert_trees_all_equal(resumed.optimizer, state.optimizer)
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [r["episode"] for r in records] == [0, 1, 2, 3, 4]


def test_a_resumed_run_keeps_the_order_of_its_replay_buffer(tmp_path):
    # The buffer keeps 3 .. 12 of 13 episodes; sorted as text, 10 would come first.
    config = CONFIG.replace(eval={"every": 0}, replay={"capacity": 10})
    straight, _ = run(tmp_path / "straight", 16, config=config)
    run(tmp_path / "run", 13, config=config)
    resumed, _ = run(tmp_path / "run", 16, resume=True, config=config)
    chex.assert_trees_all_equal(resumed.params, straight.params)


# Resets before the interrupt, two of them per evaluation, and the episodes saved by then.
@pytest.mark.parametrize(("interrupted_at", "episodes"), [(1, 0), (4, 2), (6, 3), (8, 4)])
def test_an_interrupted_run_is_saved_and_loses_nothing(
    straight, tmp_path, interrupted_at, episodes
):
    _, state, _ = straight
    handler = signal.getsignal(signal.SIGINT)
    resets = []

    class Interrupting:
        def __init__(self, config, training):
            self.env = make_counting(config, training=training)
            self.observation_space, self.close = self.env.observation_space, self.env.close
            self.action_space = self.env.action_space

        def reset(self, seed):
            resets.append(seed)
            if len(resets) == interrupted_at:
                os.kill(os.getpid(), signal.SIGINT)
            return self.env.reset(seed=seed)

        def step(self, action):
            return self.env.step(action)

    with pytest.raises(cli.Interrupted, match="SIGINT"):
        run(tmp_path / "run", 5, make=Interrupting)
    assert rundir.latest(tmp_path / "run").name == f"{episodes:08d}"
    resumed, _ = run(tmp_path / "run", 5, resume=True)
    chex.assert_trees_all_equal(resumed.params, state.params)
    for name in ("metrics", "evaluations"):
        ours, theirs = (
            [
                (r["episode"], r.get("episode/return"), r.get("returns"))
                for r in read_jsonl(directory / f"{name}.jsonl")
            ]
            for directory in (tmp_path / "run", straight[0])
        )
        assert ours == theirs
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_run_interrupted_while_learning_makes_its_remaining_updates(
    straight, tmp_path, monkeypatch
):
    _, state, _ = straight
    update = learner_module.update

    def interrupting(state, batch, *, config):
        if int(state.step) == 4:  # the second of the fourth episode's three updates
            os.kill(os.getpid(), signal.SIGTERM)
        return update(state, batch, config=config)

    monkeypatch.setattr(learner_module, "update", interrupting)
    with pytest.raises(cli.Interrupted, match="SIGTERM"):
        run(tmp_path / "run", 5)
    assert rundir.latest(tmp_path / "run").name == "00000004"
    monkeypatch.undo()
    resumed, _ = run(tmp_path / "run", 5, resume=True)
    chex.assert_trees_all_equal(resumed.params, state.params)
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [r["episode"] for r in records] == [0, 1, 2, 3, 4]


def test_a_run_killed_before_its_first_checkpoint_can_be_resumed(straight, tmp_path, monkeypatch):
    _, state, _ = straight
    monkeypatch.setattr(source_module, "roll_out", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run", 5)
    monkeypatch.undo()
    resumed, _ = run(tmp_path / "run", 5, resume=True)
    chex.assert_trees_all_equal(resumed.params, state.params)


def test_a_finished_run_says_that_there_is_nothing_to_do(tmp_path):
    run(tmp_path / "run", 2)
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.npz"))
    _, output = run(tmp_path / "run", 2, resume=True)
    assert "nothing to do: 2 of 2 episodes" in output
    with pytest.raises(UsageError, match=r"--collect\.episodes is 1, but the run has collected 2"):
        run(tmp_path / "run", 1, resume=True)
    assert rundir.load_config(tmp_path / "run").collect.episodes == 2
    assert before == sorted(p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.npz"))


# The last three of the five episodes make three updates each; an evaluation follows.
@pytest.mark.parametrize("at", ["update", "evaluation"])
def test_a_run_interrupted_at_its_end_can_still_finish(straight, tmp_path, monkeypatch, at):
    _, state, _ = straight
    config = CONFIG.replace(eval={"every": 5})

    def interrupting(function, when):
        def call(*args, **kwargs):
            if when(args):
                os.kill(os.getpid(), signal.SIGINT)
            return function(*args, **kwargs)

        return call

    if at == "update":  # the second of the last three
        update = interrupting(learner_module.update, lambda args: int(args[0].step) == 7)
        monkeypatch.setattr(learner_module, "update", update)
    else:
        evaluate = interrupting(Environments.evaluate, lambda args: True)
        monkeypatch.setattr(Environments, "evaluate", evaluate)
    with pytest.raises(cli.Interrupted, match="SIGINT"):
        run(tmp_path / "run", 5, config=config)
    monkeypatch.undo()
    resumed, output = run(tmp_path / "run", 5, config=config, resume=True)
    assert "nothing to do" not in output
    chex.assert_trees_all_equal(resumed.params, state.params)
    assert [r["episode"] for r in read_jsonl(tmp_path / "run" / "evaluations.jsonl")] == [4]
    _, output = run(tmp_path / "run", 5, config=config, resume=True)
    assert "nothing to do" in output


def test_a_refused_run_leaves_nothing_behind(tmp_path):
    bad = CONFIG.replace(replay={"placement": "device"}, env={"max_steps": 0})
    with pytest.raises(UsageError, match=r"give --env\.max-steps"):
        run(tmp_path / "run", 2, config=bad)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match=r"--learn\.devices is 9"):
        run(tmp_path / "run", 2, config=CONFIG.replace(learn={"devices": 9}))
    assert not (tmp_path / "run").exists()
    run(tmp_path / "run", 2)


def test_an_environment_that_raises_costs_no_learning(tmp_path):
    def failing(config, training):
        env = make_counting(config, training=training)
        reset = env.reset

        def reset_or_fail(*, seed):
            if next(resets) == 5:  # of the fourth episode: evaluation made two resets
                raise OSError("the road is closed")
            return reset(seed=seed)

        env.reset = reset_or_fail
        return env

    resets = itertools.count()
    config = CONFIG.replace(checkpoint={"every": 25})
    with pytest.raises(OSError, match="the road is closed"):
        run(tmp_path / "run", 5, config=config, make=failing)
    assert rundir.latest(tmp_path / "run").name == "00000003"
    state, _ = run(tmp_path / "run", 5, config=config, resume=True)
    assert int(state.step) == 9


def test_a_longer_run_remembers_its_length(tmp_path):
    run(tmp_path / "run", 2)
    run(tmp_path / "run", 3, resume=True)
    assert rundir.load_config(tmp_path / "run").collect.episodes == 3


def test_several_environments_resume_exactly(tmp_path):
    config = dataclasses.replace(
        CONFIG, collect=dataclasses.replace(CONFIG.collect, num_envs=2, seed_episodes=1)
    )
    straight, _ = run(tmp_path / "straight", 6, config=config)
    run(tmp_path / "run", 4, config=config)
    resumed, _ = run(tmp_path / "run", 6, config=config, resume=True)
    assert int(straight.step) == 15  # five episodes of 30 steps, a tenth of an update each
    chex.assert_trees_all_equal(resumed.params, straight.params)


def test_the_action_size_is_the_environments(tmp_path):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, action_dim=2))
    run(tmp_path / "run", 1, config=config)
    assert rundir.load_config(tmp_path / "run").model.action_dim == 3
    with np.load(tmp_path / "run" / "replay" / "00000000.npz", allow_pickle=False) as file:
        assert file["actions"].shape == (30, 3)


def test_metrics_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    run(tmp_path / "run", 3)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"episode": 3, "episode/return": 1.0}\n{"episode": 4, "epis')
    run(tmp_path / "run", 5, resume=True)
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [r["episode"] for r in records] == [0, 1, 2, 3, 4]
    assert records[3]["episode/return"] == 465


def test_episodes_too_short_for_a_segment_do_not_stop_the_run(tmp_path):
    state, output = run(tmp_path / "run", 6, make=functools.partial(make_counting, length=4))
    assert int(state.step) == 0
    assert output.count("no episode so far is as long as a training segment (18 steps)") == 1
    assert len(rundir.checkpoints(tmp_path / "run")) == 2


def test_carracing_trains_evaluates_and_resumes_on_worker_processes(tmp_path):
    base = PRESETS["tiny"]
    config = dataclasses.replace(
        base,
        env=dataclasses.replace(base.env, max_steps=24),
        collect=dataclasses.replace(base.collect, seed_episodes=2, num_envs=2),
        eval=dataclasses.replace(base.eval, every=4),
    )
    state, output = run(tmp_path / "run", 4, config=config, make=make_env)
    assert int(state.step) == 4  # two episodes of 24 steps
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    (evaluation,) = read_jsonl(tmp_path / "run" / "evaluations.jsonl")
    assert evaluation["episode"] == 3
    assert len(evaluation["returns"]) == 1
    assert "evaluation after 4 episodes" in output


def test_the_defaults_of_the_command_are_the_papers():
    arguments = parse_arguments(["--env", "carracing"])
    assert arguments.config == PRESETS["paper"]
    assert parse_arguments(["--preset=cpu"]).config == PRESETS["cpu"]


def test_options_override_the_preset():
    config = parse_arguments(
        ["--preset", "tiny", "--model.dynamics", "mlp", "--collect.num-envs", "3"]
    ).config
    assert config.model.dynamics == "mlp"
    assert config.collect.num_envs == 3
    assert config.model.latent_dim == PRESETS["tiny"].model.latent_dim


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "papr"], "unknown preset 'papr'"),
        (["--model.dynamcs", "mlp"], "unknown option --model.dynamcs.*--model.dynamics"),
        (["--frobnicate"], "unknown option --frobnicate: --help lists them all"),
        (["--planner.candidates", "many"], "--planner.candidates.*'many'"),
        (["--resume", "nowhere"], "nowhere is not a run directory"),
    ],
)
def test_bad_options_are_answered_in_one_sentence(argv, message):
    with pytest.raises(UsageError, match=message) as caught:
        parse_arguments(argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"dynamics": "flw"}}, "--model.dynamics: unknown 'flw'; did you mean 'flow'"),
        ({"planner": {"kind": "cen"}}, "--planner.kind: unknown 'cen'; did you mean 'cem'"),
        ({"learn": {"terms": ("value", "xyz")}}, "--learn.terms: unknown 'xyz'; choose"),
        ({"model": {"networks": ("planner",)}}, "--model.networks: unknown 'planner'"),
        ({"collect": {"source": "files"}}, "--collect.source: unknown 'files'"),
    ],
)
def test_a_member_that_there_is_not_is_named_before_anything_is_made(tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "run", 1, config=CONFIG.replace(**change))
    assert not (tmp_path / "run").exists()


def test_a_run_resumes_only_with_its_own_settings(straight):
    directory, _, _ = straight
    config = rundir.load_config(directory)
    with pytest.raises(UsageError, match=r"another learn.batch_size: the run has 8, not 16"):
        run(directory, 5, resume=True, config=config.replace(learn={"batch_size": 16}))
    with pytest.raises(UsageError, match=r"another collect.episodes_per_round"):
        run(directory, 5, resume=True, config=config.replace(collect={"episodes_per_round": 3}))
    assert rundir.load_config(directory) == config
    longer = parse_arguments(["--resume", str(directory), "--collect.episodes", "9"]).config
    assert longer.collect.episodes == 9


def test_one_line_says_what_a_decision_costs_on_a_cpu(tmp_path):
    heavy = dataclasses.replace(
        CONFIG, planner=dataclasses.replace(CONFIG.planner, candidates=512, iterations=10)
    )
    _, output = run(tmp_path / "heavy", 1, config=heavy)
    assert ("fewer --planner.candidates cost less" in output) == (jax.default_backend() == "cpu")
    _, output = run(tmp_path / "light", 1)
    assert "a decision costs" not in output


def poison(monkeypatch, updates):
    """Give the batches of these updates rewards that are NaN."""
    numbers, gather = itertools.count(), Replay.gather

    def poisoned(self, segments):
        batch = gather(self, segments)
        if next(numbers) in updates:
            batch = batch.replace(rewards=np.full_like(batch.rewards, np.nan))
        return batch

    monkeypatch.setattr(Replay, "gather", poisoned)


def test_training_stops_after_consecutive_non_finite_updates(tmp_path, monkeypatch):
    config = CONFIG.replace(learn={"nonfinite_limit": 4})
    poison(monkeypatch, range(2, 100))
    with pytest.raises(StoppedError, match=r"4 updates in a row.*loss/reward.* in update 6"):
        run(tmp_path / "run", 5, config=config)
    assert rundir.latest(tmp_path / "run").name == "00000004"
    batches = sorted((tmp_path / "run" / "nonfinite").glob("*.npz"))
    assert [path.stem for path in batches] == [f"{n:08d}" for n in (3, 4, 5, 6)]
    with np.load(batches[0], allow_pickle=False) as file:
        assert np.isnan(file["rewards"]).all()
        assert np.isfinite(file["actions"]).all()
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [r["episode"] for r in records] == [0, 1, 2, 3]
    assert np.isfinite(records[2]["loss/total"])
    monkeypatch.undo()
    state, _ = run(tmp_path / "run", 5, config=config, resume=True)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_a_single_non_finite_update_is_reported(tmp_path, monkeypatch):
    poison(monkeypatch, [2])
    state, output = run(tmp_path / "run", 5)
    assert output.count("which was refused; its batch is in") == 1
    assert int(state.step) == 9


@pytest.mark.parametrize("num_envs", [1, 3])
def test_training_stops_if_the_planner_has_no_finite_score(tmp_path, monkeypatch, num_envs):
    roll_out = source_module.roll_out

    def without_score(*args, **kwargs):
        rollouts = roll_out(*args, **kwargs)
        bad = [dataclasses.replace(d, predicted_return=-np.inf) for d in rollouts]
        return bad if num_envs == 1 else [*bad[:-1], rollouts[-1]]  # one in time counts for itself

    monkeypatch.setattr(source_module, "roll_out", without_score)
    config = CONFIG.replace(learn={"nonfinite_limit": 2}, collect={"num_envs": num_envs})
    with pytest.raises(StoppedError, match="2 episodes in a row, the last of them episode 2"):
        run(tmp_path / "run", 6, config=config)
    assert rundir.latest(tmp_path / "run").name == ("00000002" if num_envs == 1 else "00000003")


class FullDisk:
    """A disk that is full for a while; writes to it fail as they do on a real one."""

    def __init__(self, monkeypatch):
        self.full = False
        self.refused = []
        for module, name, error in (
            (npz, "_write_arrays", OSError(errno.ENOSPC, "No space left on device")),
            (ocp.StandardCheckpointer, "save", ValueError("RESOURCE_EXHAUSTED: Error writing")),
            (os, "fsync", OSError(errno.ENOSPC, "No space left on device")),
        ):
            monkeypatch.setattr(module, name, self.failing(getattr(module, name), name, error))

    def failing(self, write, name, error):
        def attempt(*args, **kwargs):
            if self.full:
                self.refused.append(name)
                raise error
            return write(*args, **kwargs)

        return attempt


@pytest.mark.parametrize("full", [{2}, {2, 3}, {0, 1, 2, 3}])
def test_a_run_survives_a_full_disk(straight, tmp_path, monkeypatch, full):
    _, state, _ = straight
    disk, drive, episodes = FullDisk(monkeypatch), Environments.drive, itertools.count()

    def driving(*args):
        rollouts = drive(*args)
        disk.full = next(episodes) in full
        return rollouts

    monkeypatch.setattr(Environments, "drive", driving)
    config = CONFIG.replace(checkpoint={"every": 1})
    after, output = run(tmp_path / "run", 5, config=config)
    assert {"_write_arrays", "fsync"} <= set(disk.refused)
    assert "warning: cannot save an episode, will try again: No space left on device" in output
    assert "warning: cannot write metrics.jsonl, will try again" in output
    assert "warning: cannot save a checkpoint" in output
    chex.assert_trees_all_equal(after.params, state.params)
    newest = rundir.latest(tmp_path / "run")
    assert newest.name == "00000005"
    assert checkpoint.verify(newest) == []
    assert list(checkpoint.verify_replay(tmp_path / "run", newest)) == []
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [r["episode"] for r in records] == [0, 1, 2, 3, 4]


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_last_one(tmp_path, monkeypatch):
    save, calls = ocp.StandardCheckpointer.save, itertools.count()

    def failing(*args, **kwargs):
        if next(calls) >= 3:  # within the second checkpoint
            raise ValueError("RESOURCE_EXHAUSTED: Error writing")
        return save(*args, **kwargs)

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", failing)
    with pytest.raises(StoppedError, match="the end of the run could not be saved"):
        run(tmp_path / "run", 5, config=CONFIG.replace(checkpoint={"every": 2}))
    (kept,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert kept.name == "00000002"
    assert checkpoint.verify(kept) == []
