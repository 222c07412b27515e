"""What users bring: each test is named after the right behaviour."""

import dataclasses
import errno
import fcntl
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings

import gymnasium as gym
import jax
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete
from rich.console import Console
from toy import CONFIG, Counting, make_counting

from valdi_jax import checkpoint as command
from valdi_jax import evaluate
from valdi_jax.config import EnvConfig
from valdi_jax.data.source import Environments
from valdi_jax.envs import interface_of, make_env, own_env
from valdi_jax.envs.spaces import Interface
from valdi_jax.envs.workers import Stepper, WorkerPool, make_pool
from valdi_jax.errors import StoppedError, UsageError
from valdi_jax.networks.normalizer import init_normalizer, merge
from valdi_jax.run import checkpoint, rundir, stored
from valdi_jax.run.display import Display
from valdi_jax.run.learner import Learner
from valdi_jax.run.log import read_jsonl
from valdi_jax.train import parse_arguments, train

ONE = Box(-1, 1, (1,))


def go(directory, episodes=2, *, make=make_counting, config=CONFIG, **settings):
    output = io.StringIO()
    config = config.replace(collect={"episodes": episodes})
    state = train(config, directory, make=make, console=Console(file=output), **settings)
    return state, output.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished") / "run"
    go(directory, 3)
    return directory


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


# The run directory


@pytest.mark.parametrize("name", ["lr[1]", "a*", "", "."])
def test_a_directory_whose_name_would_be_misread_is_refused_first(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"without any of|give it a name"):
        go(type(tmp_path)(name))
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_file_manager_in_a_checkpoint_are_ignored(run):
    for path in rundir.checkpoints(run):
        (path / ".DS_Store").write_bytes(b"")
    _, output = go(run, 4, resume=True)
    assert "warning" not in output


def test_every_readable_line_of_the_metrics_is_kept(run):
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1:1] = [b"\x00" * 40 + b"\n", b'{"episode/return": 1}\n', b"[" * 100_000 + b"\n"]
    path.write_bytes(b"".join(lines))
    _, output = go(run, 4, resume=True)
    assert "3 lines cannot be read; the original is damaged-metrics.jsonl" in output
    assert (run / "damaged-metrics.jsonl").read_bytes() == b"".join(lines)
    assert [record["episode"] for record in read_jsonl(path)] == [0, 1, 2, 3]


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    _, output = go(tmp_path / "run")
    assert "cannot be locked (No locks available): start one process alone" in output


def test_two_starts_in_one_directory_never_mix(tmp_path):
    with rundir.lock(tmp_path / "run"):
        with pytest.raises(UsageError, match="in use by the process"):
            go(tmp_path / "run")
        assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["lock"]


def test_a_checkpoint_of_another_run_is_set_aside_and_nothing_else(run, tmp_path):
    other = dataclasses.replace(CONFIG, seed=7)
    go(tmp_path / "other", 5, config=other)
    newest = rundir.latest(tmp_path / "other")
    shutil.copytree(newest, run / "checkpoints" / newest.name)
    _, output = go(run, 4, resume=True)
    assert f"{newest.name} belongs to another run" in output
    assert not list((run / "replay").glob("damaged-*"))
    assert (run / "checkpoints" / f"foreign-{newest.name}").is_dir()


def test_checkpoints_whose_names_are_exchanged_are_found(run):
    newest, oldest = (run / "checkpoints" / name for name in ("00000003", "00000009"))
    newest.rename(oldest)
    assert "another number of episodes than its name" in checkpoint.verify(oldest)[0]


@pytest.mark.parametrize("change", ["flip", "edit"])
def test_a_changed_configuration_is_found_and_can_be_accepted(run, change):
    path = run / "config.json"
    path.write_text(path.read_text().replace('"every": 2', '"every": 3'))
    with pytest.raises(UsageError, match=r"differs from its checksum.*--accept-config"):
        rundir.load_config(run)
    assert command.main([str(run), "--accept-config"]) == 0
    assert rundir.load_config(run).eval.every == 3


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"seed": ' + b"9" * 400 + b"}", b" " * 2**21]
)
def test_a_hostile_configuration_is_one_short_sentence(run, content):
    (run / "config.json").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        rundir.load_config(run)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_a_symbolic_link_in_a_run_is_not_written_through(run, tmp_path):
    (tmp_path / "precious").write_text("precious")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(UsageError, match=r"metrics\.jsonl is a symbolic link"):
        go(run, 4, resume=True)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_run_whose_directory_is_moved_stops_and_says_so(tmp_path, monkeypatch):
    drive = Environments.drive

    def moving(self, *arguments):
        if (tmp_path / "run").exists() and len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 1:
            (tmp_path / "run").rename(tmp_path / "elsewhere")
        return drive(self, *arguments)

    monkeypatch.setattr(Environments, "drive", moving)
    with pytest.raises(StoppedError, match="was moved or deleted"):
        go(tmp_path / "run", 4)
    assert not (tmp_path / "run").exists()


def test_metrics_that_no_checkpoint_knows_are_set_aside(run):
    before = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints")
    _, output = go(run, 3, resume=True)
    assert "no checkpoint knows it; the original is damaged-metrics.jsonl" in output
    assert (run / "damaged-metrics.jsonl").read_bytes() == before


def test_a_reader_gets_the_next_checkpoint_where_a_run_has_replaced_one(run, monkeypatch):
    agent = stored.open_agent(run)
    read, newest = checkpoint.read_params, rundir.latest(run)
    moved = newest.with_name("00000004")
    (run / "keep").mkdir()

    def replaced(path):
        if path == newest and not moved.exists():
            shutil.copytree(newest, moved)
            shutil.rmtree(newest)
        if path == moved:  # only its name is another
            monkeypatch.setattr(checkpoint, "verify", lambda _: [])
        return read(path)

    monkeypatch.setattr(checkpoint, "read_params", replaced)
    assert set(agent.load()) == {"encoder", "dynamics", "reward", "value"}
    assert agent.name == str(moved)


def test_a_reader_reads_the_checkpoint_that_it_named(run):
    agent = stored.open_agent(run)
    newest = rundir.latest(run)
    shutil.copytree(newest, newest.with_name("00000009"))
    agent.load()
    assert agent.name == str(newest)


def test_a_listing_leaves_out_what_a_run_deletes_meanwhile(run, monkeypatch, capsys):
    first, second = rundir.checkpoints(run)[0], run / "checkpoints" / "00000009"
    shutil.copytree(first, second)
    verify = command.verify

    def deleting(path):
        if path == second:
            shutil.rmtree(second)
        return verify(path)

    monkeypatch.setattr(command, "verify", deleting)
    assert command.main([str(run)]) == 0
    assert "damaged" not in capsys.readouterr().out


def test_a_run_of_an_environment_of_ones_own_is_not_scored_on_another(run):
    with pytest.raises(UsageError, match=r"environments that toy\.make_counting makes"):
        evaluate.main([str(run), "--episodes", "1"])
    with pytest.raises(UsageError, match="continue it from that program"):
        go(run, 4, resume=True, make=make_env)


def test_a_run_that_has_only_checkpoints_of_others_never_starts_at_zero(run, tmp_path):
    other = dataclasses.replace(CONFIG, seed=7)
    go(tmp_path / "other", 5, config=other)
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", run / "checkpoints")
    with pytest.raises(UsageError, match="no checkpoint of its own"):
        go(run, 6, resume=True)


def test_a_lost_identity_is_found_again_in_the_checkpoints(run):
    before = rundir.identity(run)["id"]
    (run / "run.json").write_text("{}")
    with pytest.raises(UsageError, match=r"is damaged.*resuming makes a new one"):
        rundir.load_config(run)
    (run / "run.json").unlink()
    _, output = go(run, 4, resume=True)
    assert rundir.identity(run)["id"] == before
    assert "another run" not in output


def test_a_kill_while_an_older_run_gets_its_checksum_leaves_it_usable(run, monkeypatch):
    (run / "run.json").unlink()
    config = rundir.load_config(run)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "write_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            rundir.save_config(run, config.replace(collect={"episodes": 77}))
    assert rundir.load_config(run) == config


# Environments


class Given(gym.Env):
    """Answers with what it is given."""

    def __init__(self, space, first, *, step=None, reward=0.0, actions=ONE):
        self.observation_space, self.action_space = space, actions
        self._first, self._reward, self._step = first, reward, step

    def reset(self, *, seed=None, options=None):
        return self._first

    def step(self, action):
        if self._step is not None:
            return self._step
        return self._first[0], self._reward, False, False, {}


THREE = Box(-np.inf, np.inf, (3,), np.float32)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_an_observation_of_another_shape_than_its_space_is_named(size):
    with pytest.raises(ValueError, match=rf"has the shape \({size},\).*its space says \(3,\)"):
        Stepper(lambda: Given(THREE, (np.zeros(size), {}))).reset(0)


def test_a_part_that_is_missing_is_named():
    space = Dict(a=THREE, b=THREE)
    with pytest.raises(ValueError, match="'b' is missing: the environment gave a dict of a"):
        Stepper(lambda: Given(space, ({"a": np.zeros(3)}, {}))).reset(0)


def test_float_frames_in_a_space_of_uint8_are_refused():
    space = Box(0, 255, (32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="frames of 0 to 1 would turn black"):
        Stepper(lambda: Given(space, (np.full((32, 32, 3), 0.5), {}))).reset(0)


@pytest.mark.parametrize("answer", [np.zeros(3), np.zeros(2), (np.zeros(3), 1.0)])
def test_the_old_reset_is_named(answer):
    with pytest.raises(ValueError, match="reset must return an observation and a dict"):
        Stepper(lambda: Given(THREE, answer)).reset(0)


def test_a_reset_without_a_seed_is_named():
    class Seedless(Given):
        def reset(self):
            return self._first

    with pytest.raises(UsageError, match=r"reset\(\) has to take a seed"):
        own_env(lambda config, training: Seedless(THREE, None), EnvConfig(), training=True)


def test_the_old_step_is_named():
    stepper = Stepper(lambda: Given(THREE, (np.zeros(3), {}), step=(np.zeros(3), 0.0, False, {})))
    stepper.reset(0)
    with pytest.raises(ValueError, match=r"step must return .* it returned 4 values"):
        stepper.step(np.zeros((1, 1)))


@pytest.mark.parametrize("reward", [np.array([1.5]), np.float64(1.5), 1.5, np.array(1.5)])
def test_a_reward_in_any_wrapping_is_a_number(reward):
    stepper = Stepper(lambda: Given(THREE, (np.zeros(3), {}), reward=reward))
    stepper.reset(0)
    assert stepper.step(np.zeros((1, 1))).rewards == [1.5]


@pytest.mark.parametrize("reward", [np.zeros(2), None, "1", 1e39, np.nan])
def test_a_reward_that_is_no_finite_number_is_named(reward):
    stepper = Stepper(lambda: Given(THREE, (np.zeros(3), {}), reward=reward))
    stepper.reset(0)
    with pytest.raises(ValueError, match="the environment's reward is"):
        stepper.step(np.zeros((1, 1)))


def test_an_observation_too_large_for_float32_is_named():
    space = Box(-np.inf, np.inf, (3,), np.float64)
    with pytest.raises(ValueError, match="observation is not finite: inf"):
        Stepper(lambda: Given(space, (np.array([0, 1e39, 0]), {}))).reset(0)


def test_spaces_of_another_library_are_named():
    class OldBox:
        shape, dtype = (3,), np.float32

    OldBox.__module__, OldBox.__name__ = "gym.spaces.box", "Box"
    with pytest.raises(UsageError, match=r"another library \(gym\.spaces\.box\.Box\)"):
        Interface(OldBox(), ONE)
    with pytest.raises(UsageError, match="actions are a space of another library"):
        Interface(THREE, OldBox())


def test_advice_does_not_flatten_an_image():
    space = Dict(camera=Box(0, 255, (32, 32, 3), np.uint8), gear=Discrete(5))
    with pytest.raises(UsageError, match=r"one-hot.*FlattenObservation would flatten images too"):
        Interface(space, ONE)


@pytest.mark.parametrize(
    ("shape", "seen"),
    [
        ((4, 96, 96, 3), (96, 96, 12)),
        ((4, 3, 64, 64), (64, 64, 12)),
        ((9, 64, 64), (64, 64, 9)),
        ((64, 64, 9), (64, 64, 9)),
        ((4, 48, 64), (48, 64, 4)),
    ],
)
def test_a_stack_of_frames_becomes_channels(shape, seen):
    interface = Interface(Box(0, 255, shape, np.uint8), ONE)
    assert interface.example.image.shape == seen
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    image = interface.observe(frames).image
    if shape == (4, 96, 96, 3):
        np.testing.assert_array_equal(image[..., 3:6], frames[1])
    if shape == (9, 64, 64):
        np.testing.assert_array_equal(image[..., 5], frames[5])


@pytest.mark.parametrize("bound", [1, np.inf])
def test_a_small_array_of_numbers_is_no_image(bound):
    interface = Interface(Box(-bound, bound, (2, 3, 4), np.float32), ONE)
    assert interface.example.image is None
    numbers = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4)).astype(np.float32)
    np.testing.assert_array_equal(interface.observe(numbers).vector, numbers.reshape(-1))
    assert Interface(Box(0, 255, (7, 7, 3), np.uint8), ONE).example.image.shape == (7, 7, 3)


def test_one_reading_far_off_does_not_ruin_the_statistics():
    rng = np.random.default_rng(0)
    vectors = rng.normal(3, 2, (400, 2)).astype(np.float32)
    vectors[7, 0] = 3.4e38
    statistics = merge(init_normalizer(2), vectors)
    assert np.isfinite(statistics["variance"]).all()
    assert statistics["variance"][0] < 5 * statistics["variance"][1]


def test_large_coordinates_are_warned_of_once():
    interface = Interface(Box(-np.inf, np.inf, (1,), np.float64), ONE)
    with pytest.warns(UserWarning, match="float32 resolves steps of"):
        interface.observe(np.array([1.7e9]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interface.observe(np.array([1.7e9]))


def test_wide_action_bounds_are_exact():
    act = Interface(THREE, Box(-1e308, 1e308, (1,), np.float64)).act
    assert [act(np.array([x], np.float32))[0] for x in (-1, 0, 0.5, 1)] == [-1e308, 0, 5e307, 1e308]


@pytest.mark.parametrize("name", ["gym:HalfCheetah-v3", "gym:NoSuch-v0", "gym:CartPole-v1"])
def test_whatever_making_an_environment_raises_is_one_sentence(name):
    make = functools.partial(make_env, EnvConfig(name=name, max_steps=5), training=True)
    with pytest.raises(UsageError) as caught:
        interface_of(make)
    assert "\n" not in str(caught.value)


class Needy(gym.Env):
    def __init__(self, needed, render_mode=None):
        raise AssertionError("never made")


def test_an_environment_that_needs_arguments_points_to_a_program():
    gym.register("Needy-v0", entry_point=f"{__name__}:Needy", max_episode_steps=5)
    with pytest.raises(UsageError, match=r"gym:Needy-v0: TypeError.*program of your own"):
        make_env(EnvConfig(name="gym:Needy-v0"), training=True)


def test_the_limit_asked_for_holds_for_environments_of_ones_own():
    def make(config, *, training):
        return Counting(max_steps=1000)

    with pytest.raises(UsageError, match="repeats actions 1 times"):
        own_env(make, EnvConfig(max_steps=8, action_repeat=2), training=True)
    with pytest.raises(UsageError, match="made no environment but None"):
        own_env(lambda config, training: None, EnvConfig(), training=True)
    for wrong in (Counting(), Counting, lambda: Counting(), lambda config: Counting()):
        with pytest.raises(UsageError, match=r"is not a function make\(config.env"):
            own_env(wrong, EnvConfig(max_steps=7), training=True)
    env = own_env(make, EnvConfig(max_steps=7), training=True)
    env.reset(seed=0)
    ends = [env.step(np.zeros(3, np.float32))[3] for _ in range(7)]
    assert ends == [False] * 6 + [True]
    with pytest.raises(UsageError, match="has no time limit: give"):
        own_env(make, EnvConfig(max_steps=0), training=True)
    held = gym.wrappers.TimeLimit(gym.wrappers.RepeatAction(Counting(), 4), 9)
    env = own_env(
        lambda config, training: held, EnvConfig(max_steps=24, action_repeat=4), training=True
    )
    env.reset(seed=0)
    assert [env.step(np.zeros(3, np.float32))[3] for _ in range(6)] == [False] * 5 + [True]
    limited = gym.wrappers.TimeLimit(Counting(), 5)
    assert (
        own_env(lambda config, training: limited, EnvConfig(max_steps=0), training=True) is limited
    )


def test_a_factory_that_workers_cannot_have_is_refused_before_anything_is_made(tmp_path):
    config = CONFIG.replace(collect={"num_envs": 2})
    with pytest.raises(UsageError, match="define it at module level"):
        go(tmp_path / "run", config=config, make=lambda config, training: Counting())
    assert not (tmp_path / "run").exists()


class Quitting(Counting):
    """Tries to end the process."""

    def __init__(self, error, **settings):
        super().__init__(**settings)
        self.error = error

    def step(self, action):
        if self.steps == 20 and self.seed % 2:
            raise self.error
        return super().step(action)


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt()], ids=["exit", "interrupt"])
def test_an_environment_cannot_end_the_run(tmp_path, error):
    def make(config, *, training):
        return Quitting(error, max_steps=config.max_steps)

    with pytest.raises(RuntimeError, match=f"the environment raised {type(error).__name__}"):
        go(tmp_path / "run", 20, make=make)
    assert checkpoint.verify(rundir.latest(tmp_path / "run")) == []


class Slow(Counting):
    """Takes longer to start than a worker may take to answer."""

    def __init__(self):
        time.sleep(2)
        super().__init__()


def test_what_a_worker_needs_to_start_does_not_count():
    example = Interface(Slow.observation_space, Slow.action_space).example
    pool = WorkerPool(Slow, 2, example=example, chunk=3, timeout=1.0)
    try:
        assert set(pool.reset({0: 1, 1: 2})) == {0, 1}
        assert pool.restarts == 0
    finally:
        pool.close()


LEFT_OPEN = """
import sys
sys.path.insert(0, {tests!r})
from toy import Counting
from valdi_jax.envs.spaces import Interface
from valdi_jax.envs.workers import WorkerPool
if __name__ == "__main__":
    example = Interface(Counting.observation_space, Counting.action_space).example
    pool = WorkerPool({factory}, 2, example=example, chunk=3)
    pool.reset({{0: 1, 1: 2}})
    pool.send({{0: [[0.0] * 3] * 3}})
    print(*[worker.process.pid for worker in pool._workers], flush=True)
    {end}
"""


@pytest.mark.parametrize("end", ["pass", "import os; os._exit(9)"])
def test_no_worker_outlives_its_program_and_none_keeps_it(tmp_path, end):
    tests = os.path.dirname(__file__)  # noqa: PTH120
    factory = "__import__('functools').partial(Counting, hang_at=1)"
    script = tmp_path / "program.py"
    script.write_text(LEFT_OPEN.format(tests=tests, factory=factory, end=end))
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, check=False
    )
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2, done.stderr
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# Options and learning


def test_the_last_of_repeated_options_wins_throughout():
    assert (
        parse_arguments(["--preset", "paper", "--preset", "cpu"]).config
        == parse_arguments(["--preset", "cpu"]).config
    )
    twice = parse_arguments(["--env", "pendulum", "--env=mountaincar"]).config
    assert twice == parse_arguments(["--env", "mountaincar"]).config


@pytest.mark.parametrize("name", ["adam_b1", "adam_b2"])
def test_a_beta_of_one_is_refused(name):
    with pytest.raises(UsageError, match="should be less than 1"):
        CONFIG.replace(learn={name: 1.0})


def test_parameters_that_are_not_finite_are_never_saved(run):
    example = Interface(Counting.observation_space, Counting.action_space).example
    config = rundir.load_config(run)
    state, _ = checkpoint.load(rundir.latest(run), example, config)
    state = state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
    learner = Learner(state, example, config=config, run_dir=run, say=print)
    with pytest.raises(StoppedError, match="parameters are not finite"):
        learner.check()


def test_the_first_error_is_never_hidden_by_one_of_saving(tmp_path, monkeypatch):
    def failing(*_, **__):
        raise ValueError("not a disk's")

    def broken(self, *_):
        raise OSError("the road is closed")

    monkeypatch.setattr(Environments, "drive", broken)
    monkeypatch.setattr(checkpoint, "save", failing)
    with pytest.raises(OSError, match="the road is closed"):
        go(tmp_path / "run")


class FailsOnce(Counting):
    """Fails in the episode of one seed."""

    bad = int(np.random.default_rng([1, CONFIG.seed, 4]).integers(2**31 - 1)) % 1000

    def step(self, action):
        if self.seed == self.bad:
            raise OSError("the road is closed")
        return super().step(action)


def make_failing_once(config, *, training):
    return FailsOnce(max_steps=config.max_steps)


def test_the_error_of_a_round_under_way_is_not_hidden_by_an_evaluation(tmp_path):
    config = CONFIG.replace(
        collect={"lag": 2, "num_envs": 2}, eval={"every": 2, "episodes": 2}, checkpoint={"every": 9}
    )
    with pytest.raises(RuntimeError, match="the road is closed"):
        go(tmp_path / "run", 8, config=config, make=make_failing_once)


def test_the_metrics_of_a_lagging_run_are_all_there(tmp_path):
    config = CONFIG.replace(collect={"lag": 1})
    go(tmp_path / "run", 4, config=config)
    *_, last = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert np.isfinite(last["loss/total"])


def test_a_reader_that_goes_away_does_not_end_the_training(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from toy import CONFIG, make_counting\n"
        "from valdi_jax.train import train\n"
        "train(CONFIG, Path(sys.argv[2]), make=make_counting)\n"
    )
    tests = os.path.dirname(__file__)  # noqa: PTH120
    program = subprocess.Popen(
        [sys.executable, "-c", code, tests, str(tmp_path / "run")], stdout=subprocess.PIPE
    )
    program.stdout.readline()
    program.stdout.close()
    assert program.wait(timeout=120) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["collect"]["episodes"] == 6
    assert rundir.latest(tmp_path / "run").name == "00000006"


def test_output_that_cannot_be_written_does_not_end_the_training(tmp_path):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    train(CONFIG, tmp_path / "run", make=make_counting, console=Console(file=Full()))
    assert rundir.latest(tmp_path / "run").name == "00000006"


def test_a_pool_of_no_environments_is_refused():
    with pytest.raises(UsageError, match="number of environments is 0"):
        make_pool(make_counting, 0, example=None, chunk=1)


def test_what_a_run_was_doing_does_not_stay_on_the_screen():
    file = io.StringIO()
    with Display(Console(force_terminal=True, file=file), 5, 0, []) as display:
        display.phase("learning: 3 updates")
        display._live.refresh()
    *_, last = file.getvalue().split("┏")  # the table's last version
    assert "learning" in file.getvalue()
    assert "learning" not in last


def test_a_full_disk_leaves_nothing_that_the_exit_waits_for(tmp_path, monkeypatch):
    from tensorboardX.event_file_writer import EventsWriter

    def full(self, event):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(EventsWriter, "write_event", full)
    before = threading.active_count()
    go(tmp_path / "run")
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 2
    assert threading.active_count() <= before + 1


def test_a_run_with_64_bit_jax_is_resumed_with_and_without_it(run):
    with jax.enable_x64(True):
        go(run, 4, resume=True)
    state, _ = go(run, 5, resume=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
    assert np.load(run / "replay" / "00000003.npz")["actions"].dtype == np.float32


def test_a_replay_larger_than_the_memory_is_warned_of_at_the_start(tmp_path, monkeypatch):
    few = {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 1024}
    monkeypatch.setattr(os, "sysconf", few.__getitem__)
    _, output = go(tmp_path / "run")
    assert "--replay.capacity" in output


def test_functools_is_named_by_what_it_wraps(tmp_path):
    make = functools.partial(make_counting, length=25)
    go(tmp_path / "run", make=make)
    assert rundir.identity(tmp_path / "run")["made_by"] == "toy.make_counting"


def test_a_program_that_leaves_a_pool_open_still_ends():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import numpy as np\n"
        "from toy import Counting\n"
        "from valdi_jax.envs.workers import WorkerPool\n"
        "from valdi_jax.observation import Observation\n"
        "example = Observation(vector=np.zeros(2, np.float32))\n"
        "pool = WorkerPool(Counting, 2, example=example, chunk=3)\n"
        "print(sorted(pool.reset({0: 1, 1: 2})))\n"
    )
    tests = os.path.dirname(__file__)  # noqa: PTH120
    done = subprocess.run(
        [sys.executable, "-c", code, tests], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "[0, 1]\n"), done.stderr
