import functools
import os
import signal
import subprocess
import sys

import gymnasium as gym
import jax
import numpy as np
import pytest
from conftest import PARITY
from toy import Counting

from valdi_jax.config import EnvConfig
from valdi_jax.envs import evaluation_seeds, import_modules, interface_of, make_env, own_env
from valdi_jax.envs.carracing import make_carracing, mask_bar, read_proprio
from valdi_jax.envs.spaces import Interface
from valdi_jax.envs.workers import LocalPool, Stepper, WorkerPool
from valdi_jax.envs.wrappers import FreshWorld, Patience, ThroughTerminals, paced
from valdi_jax.errors import StoppedError, UsageError
from valdi_jax.observation import Observation
from valdi_jax.train import parse_arguments


@pytest.fixture(scope="module")
def frames():
    with np.load(PARITY / "carracing_frames.npz", allow_pickle=False) as file:
        return dict(file)


def test_proprioception_is_read_as_the_reference_does(frames):
    for raw, expected in zip(frames["raw"], frames["proprio"], strict=True):
        np.testing.assert_allclose(read_proprio(raw), expected, atol=1e-6)
    assert frames["proprio"].any(axis=0)[[0, 5, 6]].all(), "the drive must move the needles"


def test_the_bar_is_blacked_out_and_nothing_else(frames):
    for raw, expected in zip(frames["raw"], frames["masked"], strict=True):
        np.testing.assert_array_equal(mask_bar(raw), expected)


def test_a_frame_can_be_downsampled_after_its_bar_is_read():
    small = make_env(EnvConfig(name="carracing", downsample=2), training=True)
    whole = make_env(EnvConfig(name="carracing"), training=True)
    (one, _), (other, _) = small.reset(seed=1), whole.reset(seed=1)
    assert one["image"].shape == small.observation_space["image"].shape == (48, 48, 3)
    np.testing.assert_array_equal(one["vector"], other["vector"])
    block = other["image"][20:22, 30:32].reshape(4, 3).astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(one["image"][10, 15], block, atol=0.5)
    assert one["image"].dtype == np.uint8
    # Rounding down would make it darker.
    assert one["image"].mean() == pytest.approx(other["image"].mean(), abs=0.1)


def test_a_rollout_is_reproduced_frame_by_frame(frames):
    env = make_carracing(max_steps=600)
    env.reset(seed=int(frames["seed"]))
    after = {int(step): i for i, step in enumerate(frames["step"])}
    for step, action in enumerate(frames["actions"]):
        observation, reward, terminated, truncated, _ = env.step(action)
        assert reward == pytest.approx(frames["rewards"][step])
        assert not terminated
        assert not truncated
        if step in after:
            np.testing.assert_array_equal(observation["image"], frames["masked"][after[step]])
            np.testing.assert_allclose(
                observation["vector"], frames["proprio"][after[step]], atol=1e-6
            )
    env.close()


def test_observations_and_actions_lie_in_their_spaces():
    env = make_carracing(max_steps=20)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert env.action_space.contains(np.array([-1, -1, -1], np.float32))
    for _ in range(20):
        observation, _, _, truncated, _ = env.step(np.array([0.1, -1, -1], np.float32))
    assert env.observation_space.contains(observation)
    assert truncated
    env.close()


def test_carracing_has_a_limit_of_its_own():
    env = make_env(EnvConfig(max_steps=0), training=True)
    env.reset(seed=3)
    env.unwrapped.skip_frames = True
    for step in range(1000):
        truncated = env.step(np.zeros(3, np.float32))[3]
        assert truncated == (step == 999)
    env.close()


def test_the_fixed_tracks_are_those_of_the_reference():
    seeds = evaluation_seeds(100)
    assert len(set(seeds)) == 100
    assert seeds[:3] == [1501552845, 488200390, 1693606510]
    assert evaluation_seeds(3) == seeds[:3]


@pytest.mark.parametrize("count", [0, 101])
def test_only_a_hundred_evaluation_episodes_exist(count):
    with pytest.raises(UsageError, match="between 1 and 100"):
        evaluation_seeds(count)


def test_an_environment_from_a_factory_needs_that_factory():
    with pytest.raises(UsageError, match="a program of your own makes"):
        make_env(EnvConfig(name="gym"), training=True)


def test_an_unknown_environment_suggests_the_nearest():
    with pytest.raises(UsageError, match=r"unknown environment 'carrcing'.*'carracing'"):
        make_env(EnvConfig(name="carrcing"), training=True)


@pytest.mark.parametrize(
    ("name", "vector", "actions"),
    [
        ("pendulum", 3, 1),
        ("mountaincar", 2, 1),
        ("lunarlander", 8, 2),
        ("bipedalwalker", 24, 4),
        ("bipedalwalker-hardcore", 24, 4),
        ("gym:Pendulum-v1", 3, 1),
    ],
)
def test_gymnasiums_continuous_tasks_have_names(name, vector, actions):
    factory = functools.partial(make_env, EnvConfig(name=name, max_steps=0), training=True)
    interface = interface_of(factory)
    assert interface.example.vector.shape == (vector,)
    assert interface.example.image is None
    assert interface.action_dim == actions
    stepper = Stepper(factory)
    first = stepper.reset(seed=3)
    steps = stepper.step(np.full((3, actions), 0.5, np.float32))
    assert first.vector.shape == steps.observations[-1].vector.shape == (vector,)
    assert len(steps.rewards) == 3
    stepper.close()


def test_mujocos_tasks_work_if_it_is_installed(tmp_path, monkeypatch):
    pytest.importorskip("mujoco")
    monkeypatch.chdir(tmp_path)  # it writes a log where it runs
    stepper = Stepper(
        functools.partial(
            make_env, EnvConfig(name="gym:HalfCheetah-v5", max_steps=0), training=True
        )
    )
    assert stepper.reset(0).vector.shape == (17,)
    steps = stepper.step(np.ones((4, 6), np.float32))
    assert len(steps.rewards) == 4
    assert not steps.terminated


def test_an_episode_ends_at_the_given_limit_or_the_environments_own():
    for limit, steps in ((7, 7), (0, 200)):
        stepper = Stepper(
            functools.partial(make_env, EnvConfig(name="pendulum", max_steps=limit), training=True)
        )
        stepper.reset(seed=0)
        chunk = stepper.step(np.zeros((300, 1), np.float32))
        assert len(chunk.rewards) == steps
        assert chunk.truncated
        assert not chunk.terminated


def silent(**settings):
    raise RuntimeError


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gym:Pendulm-v1", "cannot make the environment gym:Pendulm-v1.*Did you mean: `Pendulum`"),
        ("gym:os:Pendulum-v1", "names a module to import.*a configuration may not import code"),
        ("gym:ValdiEndless-v0", "no time limit of its own: give one with --env.max-steps"),
        ("gym:CartPole-v1", "discrete.*continuous"),
        ("gym:FrozenLake-v1", "of the kind Discrete, not an array"),
        ("gym:ValdiSilent-v0", r"RuntimeError: raise RuntimeError .*test_envs.py, line \d+\)"),
    ],
)
def test_an_unsupported_environment_is_refused_in_one_sentence(name, message):
    if "ValdiEndless-v0" not in gym.registry:
        gym.register("ValdiEndless-v0", Counting)
        gym.register("ValdiSilent-v0", silent, max_episode_steps=9)
    with pytest.raises(UsageError, match=message) as caught:
        interface_of(functools.partial(make_env, EnvConfig(name=name, max_steps=0), training=True))
    assert "\n" not in str(caught.value)


class Rewards(gym.Env):
    """Returns the given rewards in turn."""

    observation_space = gym.spaces.Dict()
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, rewards):
        self.rewards = rewards

    def reset(self, **kwargs):
        self.next = iter(self.rewards)
        return {}, {}

    def step(self, action):
        return {}, next(self.next), False, False, {}


def test_patience_truncates_after_steps_in_a_row_without_reward():
    env = Patience(Rewards([-1, 1, -1, -1, 1, -1, -1, 0]), patience=3)
    for _ in range(2):  # the count restarts with the episode
        env.reset()
        assert [env.step(None)[3] for _ in range(8)] == [False] * 7 + [True]


def test_a_held_action_is_one_step_of_the_agent():
    once, held = (
        make_env(EnvConfig(name="pendulum", max_steps=0, action_repeat=repeat), training=True)
        for repeat in (1, 30)
    )
    once.reset(seed=0)
    held.reset(seed=0)
    for step in range(7):  # 200 environment steps: the last hold is cut off
        action = np.array([0.1 * step], np.float32)
        singles = [once.step(action) for _ in range(min(30, 200 - 30 * step))]
        observation, reward, terminated, truncated, _ = held.step(action)
        np.testing.assert_array_equal(observation, singles[-1][0])
        assert reward == pytest.approx(sum(single[1] for single in singles))
        assert not terminated
        assert truncated == (step == 6)


def test_patience_counts_holds():
    env = paced(Rewards([-1, 2, -1, -1, -1, -1, 9]), action_repeat=2, patience=2)
    env.reset()
    assert [env.step(None)[3] for _ in range(3)] == [False, False, True]


def test_held_actions_of_carracing_skip_frames():
    env, drawn = (make_env(EnvConfig(action_repeat=r), training=True) for r in (2, 1))
    env.reset(seed=0)
    drawn.reset(seed=0)
    env.skip_frames = True
    action = np.array([0.5, 1, 0], np.float32)
    for _ in range(10):
        assert not env.step(action)[0]["image"].any()
        drawn.step(action)
        observation = drawn.step(action)[0]
    np.testing.assert_array_equal(env.redraw()["image"], observation["image"])


class Ending(Rewards):
    """Terminal from the third step on, cut off after the fifth."""

    def step(self, action):
        observation, reward, _, _, info = super().step(action)
        self.steps += 1
        return observation, reward, self.steps >= 3, self.steps >= 5, info

    def reset(self, **kwargs):
        self.steps = 0
        return super().reset(**kwargs)


def test_a_score_counts_every_frame_terminal_or_not():
    env = ThroughTerminals(Ending([1, 2, 3, 4, 5]))
    for _ in range(2):
        env.reset()
        steps = [env.step(None) for _ in range(5)]
        assert [s[1] for s in steps] == [1, 2, 3, 4, 5]
        assert [s[2] for s in steps] == [False] * 4 + [True]
        assert [s[3] for s in steps] == [False] * 4 + [True]


def test_only_evaluation_continues_through_terminals():
    for training in (True, False):
        env, wrappers = make_env(EnvConfig(patience=5), training=training), []
        while isinstance(env, gym.Wrapper):
            wrappers.append(type(env))
            env = env.env
        assert (ThroughTerminals in wrappers) == (not training)
        assert (Patience in wrappers) == training


def workers(factory, size, **settings):
    example = Observation(vector=np.zeros(2, np.float32))
    return WorkerPool(factory, size, example=example, chunk=3, **settings)


def test_workers_leave_signals_to_the_parent():
    handler = signal.getsignal(signal.SIGTERM)
    pool = workers(Counting, 1)
    try:
        for signum in (signal.SIGINT, signal.SIGTERM):  # while the worker is still starting
            os.kill(pool._workers[0].process.pid, signum)
        assert pool.reset({0: 7})[0].vector[0] == 7
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        pool.close()


def step(pool, actions):
    pool.send(actions)
    return pool.receive(actions)


def test_worker_processes_answer_like_a_local_environment():
    actions = np.zeros((3, 3), np.float32)
    pool = workers(functools.partial(Counting, length=5), 2)
    try:
        for index in range(2):
            local = LocalPool(functools.partial(Counting, length=5))
            first = pool.reset({index: 42 + index})[index]
            np.testing.assert_array_equal(first.vector, local.reset({0: 42 + index})[0].vector)
            for count, terminated in ((3, False), (2, True)):
                there, here = step(pool, {index: actions})[index], step(local, {0: actions})[0]
                assert there.rewards == here.rewards
                assert len(there.rewards) == count
                assert there.terminated == here.terminated == terminated
                np.testing.assert_array_equal(
                    there.observations[-1].vector, here.observations[-1].vector
                )
    finally:
        pool.close()
    assert not any(process.is_alive() for process, *_ in pool._workers)


def test_a_failing_environment_in_a_worker_is_reported_with_its_traceback():
    pool = workers(functools.partial(Counting, fail_at=2), 1)
    try:
        pool.reset({0: 1})
        with pytest.raises(RuntimeError, match="the road is closed"):
            step(pool, {0: np.zeros((3, 3), np.float32)})
    finally:
        pool.close()


@pytest.mark.parametrize("reward", [np.nan, np.inf])
def test_a_reward_that_is_not_finite_is_an_error(reward):
    stepper = Stepper(functools.partial(Counting, reward=reward))
    stepper.reset(0)
    with pytest.raises(ValueError, match="reward is"):
        stepper.step(np.zeros((3, 3), np.float32))


def test_a_worker_that_dies_is_replaced_and_the_others_go_on():
    pool = workers(Counting, 2)
    try:
        pool.reset({0: 1, 1: 2})
        pool._workers[0].process.kill()
        answers = step(pool, dict.fromkeys((0, 1), np.zeros((3, 3), np.float32)))
        assert list(answers) == [1]
        assert pool.restarts == 1
        assert pool.reset({0: 7})[0].vector[0] == 7
    finally:
        pool.close()


def test_a_worker_that_hangs_is_replaced():
    pool = workers(functools.partial(Counting, hang_at=2), 1, timeout=15)
    try:
        pool.reset({0: 1})
        pool._timeout = 0.5  # it has started by now
        assert step(pool, {0: np.zeros((3, 3), np.float32)}) == {}
        pool._timeout = 15
        assert pool.reset({0: 7})[0].vector[0] == 7
    finally:
        pool.close()


def test_a_worker_that_is_lost_repeatedly_is_given_up():
    pool = workers(functools.partial(os._exit, 9), 1)
    try:
        assert pool.reset({0: 1}) == pool.reset({0: 1}) == {}
        with pytest.raises(StoppedError, match=r"env-0 was lost 3 times in a row \(exit code 9"):
            pool.reset({0: 1})
    finally:
        pool.close()


@pytest.mark.parametrize("where", ["here", "in workers"])
def test_only_the_last_observation_of_a_chunk_may_be_kept(where):
    factory = functools.partial(Counting, length=5)
    pool = (
        LocalPool(factory, last_only=True)
        if where == "here"
        else workers(factory, 2, last_only=True)
    )
    try:
        pool.reset({0: 1})
        for steps, rewards in ((3, [1, 2, 3]), (5, [4, 5])):
            answer = step(pool, {0: np.zeros((3, 3), np.float32)})[0]
            assert answer.rewards == rewards
            assert [o.vector[1] for o in answer.observations] == [steps]
    finally:
        pool.close()


def test_observations_of_workers_are_not_overwritten():
    pool = workers(Counting, 1)
    try:
        first = pool.reset({0: 1})[0]
        steps = step(pool, {0: np.zeros((3, 3), np.float32)})[0]
        step(pool, {0: np.zeros((3, 3), np.float32)})
        assert first.vector[1] == 0
        assert [o.vector[1] for o in steps.observations] == [1, 2, 3]
    finally:
        pool.close()


@pytest.mark.parametrize("max_steps", [8, 9])
def test_skipped_frames_do_not_change_drawn_ones(max_steps):
    rng = np.random.default_rng(0)
    whole, last = (
        Stepper(functools.partial(make_carracing, max_steps=max_steps), last_only=last_only)
        for last_only in (False, True)
    )
    first, again = whole.reset(3), last.reset(3)
    np.testing.assert_array_equal(first.image, again.image)
    for _ in range(3):  # the last of 8 steps ends within a chunk
        actions = rng.uniform(-1, 1, (3, 3)).astype(np.float32)
        one, other = whole.step(actions), last.step(actions)
        assert one.rewards == other.rewards
        (kept,) = other.observations
        np.testing.assert_array_equal(one.observations[-1].image, kept.image)
        np.testing.assert_array_equal(one.observations[-1].vector, kept.vector)
    assert other.truncated
    np.testing.assert_array_equal(whole.reset(4).image, last.reset(4).image)


def test_a_task_of_the_control_suite_is_made_by_its_name():
    pytest.importorskip("dm_control", reason="needs the extra 'dmc'")
    config = EnvConfig(name="dmc:cup-catch", max_steps=0, action_repeat=2)
    env = make_env(config, training=True)
    interface = Interface(env.observation_space, env.action_space)
    assert interface.example.vector.shape == (8,)
    assert interface.action_dim == 2
    seen = []
    for _ in range(2):
        observation, _ = env.reset(seed=3)
        seen.append(interface.observe(observation).vector)
    np.testing.assert_array_equal(*seen)
    steps, over = 0, False
    while not over:
        _, reward, terminated, truncated, _ = env.step(env.action_space.high)
        steps, over = steps + 1, terminated or truncated
        assert 0 <= reward <= 2
    assert steps == 500
    assert not terminated
    with pytest.raises(UsageError, match="did you mean dmc:cheetah-run"):
        make_env(EnvConfig(name="dmc:cheetah-runn"), training=True)


def test_a_task_of_the_control_suite_is_seen_in_pixels():
    pytest.importorskip("dm_control", reason="needs the extra 'dmc'")
    config = EnvConfig(name="dmc:cartpole-swingup", max_steps=20, action_repeat=2, pixels=64)
    try:
        env = make_env(config, training=True)
        observation, _ = env.reset(seed=0)
    except Exception as reason:
        pytest.skip(f"nothing can be rendered here: {reason}")
    interface = Interface(env.observation_space, env.action_space)
    image = interface.observe(observation).image
    assert image.shape == (64, 64, 9)
    assert image.std() > 5
    observation, *_ = env.step(np.ones(1))
    later = interface.observe(observation).image
    np.testing.assert_array_equal(later[..., :6], image[..., 3:], "of successive decisions")
    assert np.any(later[..., 6:] != image[..., 6:])


def test_a_module_that_registers_environments_is_imported_on_request(tmp_path, monkeypatch):
    (tmp_path / "registers_mine.py").write_text(
        "import gymnasium\n"
        "from gymnasium.envs.classic_control import PendulumEnv\n"
        "gymnasium.register('Mine-v0', PendulumEnv, max_episode_steps=50)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("VALDI_JAX_IMPORT", "")
    config = EnvConfig(name="gym:Mine-v0", max_steps=0)
    with pytest.raises(UsageError, match="Mine"):
        make_env(config, training=True)
    arguments = parse_arguments(["--env", "gym:Mine-v0", "--env.import", "registers_mine"])
    import_modules(arguments.imports)
    assert make_env(config, training=True).spec.max_episode_steps == 50
    code = (
        "from valdi_jax.config import EnvConfig; from valdi_jax.envs import make_env\n"
        "make_env(EnvConfig(name='gym:Mine-v0', max_steps=0), training=True)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # as a worker process
    with pytest.raises(UsageError, match=r"--env\.import: cannot import 'no_such_module'"):
        import_modules(["no_such_module"])


@pytest.mark.parametrize(
    "name",
    [
        "pendulum",
        "mountaincar",
        "lunarlander",
        "bipedalwalker",
        "bipedalwalker-hardcore",
        "gym:BipedalWalker-v3",
        "carracing",
        "maze:umaze",
        "dmc:walker-stand",
    ],
)
def test_an_episode_depends_on_its_seed_and_not_on_those_before(name):
    if name.startswith("dmc:"):
        pytest.importorskip("dm_control")
    config = EnvConfig(name=name, max_steps=40 if name == "carracing" else 150)

    def episode(env, seed):
        rng = np.random.default_rng(seed)
        observation, _ = env.reset(seed=seed)
        seen, over = [observation], False
        while not over:
            action = rng.uniform(env.action_space.low, env.action_space.high)
            observation, reward, terminated, truncated, _ = env.step(
                action.astype(env.action_space.dtype)
            )
            seen.append((observation, reward))
            over = terminated or truncated
        return seen

    used = make_env(config, training=True)
    for seed in range(2):
        episode(used, seed)
    again, first = (episode(env, 3) for env in (used, make_env(config, training=True)))
    jax.tree.map(np.testing.assert_array_equal, again, first)


def test_a_factorys_walker_gets_fresh_worlds_and_no_namesake_does():
    def make(config, training):
        return gym.make("BipedalWalker-v3")

    env = own_env(make, EnvConfig(max_steps=0), training=True)
    assert isinstance(env, FreshWorld)
    gym.register("BipedalWalkerToy-v0", entry_point=Counting, max_episode_steps=3)
    try:
        make_env(EnvConfig(name="gym:BipedalWalkerToy-v0", max_steps=3), training=True).reset(
            seed=0
        )
    finally:
        del gym.registry["BipedalWalkerToy-v0"]
