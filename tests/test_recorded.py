"""Learning from recorded episodes."""

import functools
import io
import signal
import types
from pathlib import Path

import gymnasium as gym
import jax
import numpy as np
import pytest
from rich.console import Console
from toy import CONFIG, Counting, make_counting

from valdi_jax import record as record_module
from valdi_jax.agent import Agent
from valdi_jax.checkpoint import main as checkpoint_main
from valdi_jax.config import DiffuserConfig, EnvConfig, UNetConfig, require_terms, validate
from valdi_jax.data.recorded import environment_of, read_recorded, to_episodes
from valdi_jax.data.replay import Replay
from valdi_jax.data.store import gather, store_episode, store_shapes
from valdi_jax.envs import interface_of, make_env, own_env
from valdi_jax.envs.spaces import Interface
from valdi_jax.errors import UsageError
from valdi_jax.losses import draw, objective
from valdi_jax.model import init_params
from valdi_jax.record import _Random, record
from valdi_jax.record import main as record_main
from valdi_jax.run import checkpoint, npz, rundir, stored
from valdi_jax.run.log import read_jsonl
from valdi_jax.run.stored import StoredAgent, open_agent
from valdi_jax.train import main, parse_arguments, train

OFFLINE = CONFIG.replace(
    collect={"source": "data", "data": "given", "epoch": 4, "episodes": 3},
    checkpoint={"every": 1},
)
DIFFUSER = OFFLINE.replace(
    model={
        "networks": ("unet", "plan_value"),
        "horizon": 7,
        "chunk": 1,
        "unet": UNetConfig(width=32, multipliers=(1,), timesteps=4),
    },
    planner={"kind": "diffuser", "candidates": 3, "elites": 2},
    learn={"terms": ("plan", "plan_value"), "act": "ema", "ema_every": 2, "ema_start": 4},
    replay={"sampling": "step"},
)


def recorded(steps=30, seed=0, terminated=False, **changes):
    """An episode of the toy environment, as Minari gives it."""
    rng = np.random.default_rng(seed)
    over = np.arange(steps) == steps - 1
    fields = {
        "observations": {
            "vector": np.stack([np.full(steps + 1, seed), np.arange(steps + 1)], axis=1).astype(
                np.float32
            )
        },
        "actions": rng.uniform(-1, 1, (steps, 3)).astype(np.float32),
        "rewards": np.arange(1.0, steps + 1),
        "terminations": over & terminated,
        "truncations": over & (not terminated),
    }
    return types.SimpleNamespace(**fields | changes)


EPISODES = [recorded(seed=seed) for seed in range(4)]


def run(directory, config=OFFLINE, data=EPISODES, **settings):
    output = io.StringIO()
    state = train(
        config, directory, data=data, make=make_counting, console=Console(file=output), **settings
    )
    return state, output.getvalue()


def interface():
    env = make_counting(CONFIG.env, training=True)
    return Interface(env.observation_space, env.action_space)


def test_recorded_episodes_become_the_agents():
    (episode,) = to_episodes([recorded(20, seed=7, terminated=True)], interface(), CONFIG)
    assert episode.observations.vector.shape == (21, 2)
    assert np.all(episode.observations.vector[:, 0] == 7)
    np.testing.assert_array_equal(episode.rewards, np.arange(1, 21))
    assert episode.terminated
    assert not episode.truncated
    strided = CONFIG.replace(env={"render_every": "chunk"}, model={"chunk": 3})
    (episode,) = to_episodes([recorded(20)], interface(), strided)
    assert episode.observations.vector[:, 1].tolist() == [0, 3, 6, 9, 12, 15, 18, 20]


def test_actions_are_scaled_from_the_environments_bounds():
    env = make_counting(CONFIG.env, training=True)
    env.action_space = type(env.action_space)(
        np.array([0, -2, -1], np.float32), np.array([1, 2, 3], np.float32)
    )
    ours = Interface(env.observation_space, env.action_space)
    actions = np.array([[0, 2, 1], [0.5, -1, 5]], np.float32)
    np.testing.assert_allclose(ours.unact(actions), [[-1, 1, 0], [0, -0.5, 1]])
    np.testing.assert_allclose(ours.act(ours.unact(actions[:1])[0]), actions[0])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"actions": np.zeros((30, 2))}, r"episode 0: its actions have the shape \(30, 2\)"),
        ({"actions": np.zeros((30, 1))}, r"its actions have the shape \(30, 1\)"),
        ({"actions": np.zeros((30, 3), int)}, "and type int64"),
        ({"actions": np.zeros((29, 3))}, "29 actions for 30 rewards"),
        ({"actions": np.full((30, 3), np.nan)}, "an action is not finite"),
        ({"rewards": np.full(30, np.inf)}, "a reward is not finite"),
        ({"rewards": []}, "no step"),
        ({"observations": {"vector": np.zeros((31, 3), np.float32)}}, r"shape \(3,\)"),
        ({"observations": {"vector": np.zeros((20, 2), np.float32)}}, "20 observations for 30"),
        ({"observations": {"vector": np.zeros((32, 2), np.float32)}}, "32 .* rewards, not 31"),
        ({"terminations": np.arange(30) == 4}, "ends before its last step"),
        ({"truncations": np.arange(30) == 4}, "ends before its last step"),
        ({"terminations": np.zeros(29, bool)}, "flags are not one a step"),
        ({"observations": {"other": np.zeros((31, 2), np.float32)}}, "'vector' is missing"),
    ],
)
def test_what_does_not_fit_is_named(changes, complaint):
    with pytest.raises(UsageError, match=complaint):
        to_episodes([recorded(**changes)], interface(), CONFIG)


def test_no_episodes_are_refused():
    with pytest.raises(UsageError, match="holds no episode"):
        to_episodes([], interface(), CONFIG)


def test_a_batch_holds_the_chosen_share_of_recorded_episodes():
    config = CONFIG.replace(replay={"data_share": 0.25}, collect={"episodes": 10})
    replay = Replay(config)
    given = to_episodes([recorded(seed=100 + seed) for seed in range(3)], interface(), config)
    for episode in given:
        replay.give(episode)

    def seeds():
        batch = replay.gather(replay.draw(np.random.default_rng(0), 40))
        return batch.observations.vector[:, 0, 0]

    assert np.all(seeds() >= 100)
    for episode in to_episodes([recorded(seed=seed) for seed in range(20)], interface(), config):
        replay.add(episode)  # more than there is room for: the recorded ones stay
    assert np.sum(seeds() >= 100) == 10
    assert len(replay) == 3 + config.replay.capacity
    rng = np.random.default_rng(0)  # a quarter of two is drawn now and then
    batches = [replay.gather(replay.draw(rng, 2)).observations.vector for _ in range(200)]
    assert 0.15 < np.mean([vectors[:, 0, 0] >= 100 for vectors in batches]) < 0.35


@pytest.fixture(scope="module", params=[OFFLINE, DIFFUSER], ids=["valdi", "diffuser"])
def offline(request, tmp_path_factory):
    """A run on data alone: its configuration, directory, agent and output."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    return request.param, directory, *run(directory, request.param)


def test_training_on_data_alone(offline):
    _, directory, state, output = offline
    assert "epoch 3/3" in output
    assert "evaluation after 2 epochs" in output
    assert int(state.step) == 12
    records = read_jsonl(directory / "metrics.jsonl")
    assert [record["episode"] for record in records] == [0, 1, 2]
    assert all(np.isfinite(record["loss/total"]) for record in records)
    assert not list((directory / "replay").glob("*.npz"))  # the data stay where they are


def test_it_resumes_bit_for_bit(offline, tmp_path):
    config, _, state, _ = offline
    run(tmp_path / "parts", config.replace(collect={"episodes": 1}))
    resumed, _ = run(tmp_path / "parts", config, resume=True)
    jax.tree.map(np.testing.assert_array_equal, state.replace(key=0), resumed.replace(key=0))
    with pytest.raises(UsageError, match=r"came from a program|environments that toy"):
        main(["--resume", str(tmp_path / "parts")])


def test_its_agent_acts(offline):
    config, directory, *_ = offline
    agent = Agent.load(directory, make=make_counting)
    plan = agent.plan({"vector": np.zeros(2, np.float32)})
    assert plan.actions.shape == config.plan_shape
    assert np.abs(plan.actions).max() <= 1
    again = agent.plan({"vector": np.zeros(2, np.float32)})
    np.testing.assert_array_equal(plan.actions, again.actions)


@pytest.mark.parametrize("name", ["plan", "plan_value"])
def test_a_loss_of_diffuser_trains_its_own_network(name):
    config = DIFFUSER.replace(learn={"terms": (name,)}, model={"state_dim": 2})
    (episode,) = to_episodes([recorded()], interface(), config)
    replay = Replay(config)
    replay.give(episode)
    batch = replay.gather(replay.draw(np.random.default_rng(0), 4))
    params = init_params(jax.random.key(0), episode.observations, config=config)
    draws = draw(jax.random.key(1), 4, config=config)
    loss = jax.jit(jax.grad(lambda p: objective(p, p, batch, draws, config=config)[0]))
    gradients = loss(params)
    trained = {"plan": "unet", "plan_value": "plan_value"}[name]
    for network, tree in gradients.items():
        assert any(np.any(leaf) for leaf in jax.tree.leaves(tree)) == (network == trained)


def test_it_goes_on_in_the_environment_with_the_data(offline, tmp_path):
    config, directory, *_ = offline
    online = config.replace(
        collect={"source": "environment", "episodes": 3, "seed_episodes": 1}, eval={"every": 0}
    )
    state, output = run(tmp_path / "online", online, init_from=directory)
    assert "episode 3/3" in output
    assert int(state.step) > 0
    assert len(list((tmp_path / "online" / "replay").glob("*.npz"))) == 3
    run(tmp_path / "parts", online.replace(collect={"episodes": 2}), init_from=directory)
    resumed, _ = run(tmp_path / "parts", online, resume=True)
    jax.tree.map(np.testing.assert_array_equal, state.replace(key=0), resumed.replace(key=0))


def test_other_given_data_change_the_normaliser(tmp_path):
    config = OFFLINE.replace(
        model={"normalize": True}, collect={"episodes": 1, "epoch": 1}, eval={"every": 0}
    )
    first, _ = run(tmp_path / "first", config)
    second, _ = run(tmp_path / "second", config, [recorded(seed=9)], init_from=tmp_path / "first")
    fixed = config.replace(learn={"encoder_rate": 0.0})
    third, _ = run(tmp_path / "third", fixed, [recorded(seed=9)], init_from=tmp_path / "first")
    counts = [float(each.params["normalizer"]["count"]) for each in (first, second, third)]
    known = counts[0]
    assert counts == [known, known + 31, known]


def test_diffusers_moving_average_starts_late_and_acts(tmp_path):
    state, _ = run(tmp_path / "early", DIFFUSER.replace(collect={"episodes": 1}, eval={"every": 0}))
    assert int(state.step) == 4  # before ema_start, but after the copy at step 2
    moved = [
        not np.array_equal(ours, ema)
        for ours, ema in zip(
            jax.tree.leaves(state.params["unet"]),
            jax.tree.leaves(state.ema_params["unet"]),
            strict=True,
        )
    ]
    assert any(moved)  # update 3 came after the last copy
    jax.tree.map(np.testing.assert_array_equal, state.acting, state.ema_params)
    scalers = state.params["scalers"]
    states = np.concatenate([each.observations["vector"][:-1] for each in EPISODES])
    np.testing.assert_allclose(scalers["states"]["center"], states.mean(axis=0), rtol=1e-5)


def checked(config):
    validate(config)
    require_terms(config)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"collect": {"lag": 1}}, "--collect.lag"),
        ({"model": {"chunk": 2}}, "--model.chunk"),
        ({"model": {"horizon": 8, "unet": UNetConfig()}}, "--model.horizon"),
        ({"planner": {"kind": "cem", "candidates": 2}}, "--planner.kind diffuser"),
        ({"learn": {"terms": ("plan", "reward")}}, "stands alone, without reward"),
        ({"learn": {"terms": ("plan",)}}, "give --learn.terms plan_value too"),
        ({"learn": {"encoder_rate": 0.5}}, "--learn.encoder-rate"),
        ({"learn": {"random_shift": 2}}, "--learn.random-shift does nothing"),
        ({"learn": {"mirror": True}}, "--learn.mirror is for carracing"),
        ({"model": {"normalize": True}}, "--model.normalize does nothing"),
        ({"env": {"name": "pendulum", "pixels": 64}}, "--env.pixels is for dmc"),
        ({"env": {"name": "pendulum", "frames": 4}}, "--env.frames is 4, but without --env.pixels"),
        ({"planner": {"precision": "bfloat16"}}, "--planner.precision does nothing"),
        ({"planner": {"answer": "sample"}}, "is for --planner.kind mppi"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, complaint):
    config = DIFFUSER.replace(**changes)
    with pytest.raises(UsageError, match=complaint):
        checked(config)


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


class Still:
    """Does nothing."""

    def reset(self):
        pass

    def act(self, observation):
        return np.zeros(1, np.float32)


def test_recording_and_learning_from_it(tmp_path, datasets, capsys):
    assert record_main(["minari:pendulum/random-v0", "--episodes", "2", "--env", "pendulum"]) == 0
    assert "2 episodes, mean return -" in capsys.readouterr().out
    with pytest.raises(UsageError, match="exists already"):
        record_main(["minari:pendulum/random-v0", "--env", "pendulum"])
    with pytest.raises(UsageError, match="one of --agent, --replay, or --env"):
        record_main(["minari:pendulum/other-v0"])
    options = [
        "--env",
        "pendulum",
        "--preset",
        "tiny",
        "--run-dir",
        str(tmp_path / "run"),
        "--eval.every",
        "0",
    ]
    offline = ["--collect.source", "data", "--collect.episodes", "1", "--collect.epoch", "2"]
    assert main([*options, *offline, "--data", "minari:pendulum/random-v0"]) == 0
    assert rundir.load_config(tmp_path / "run").collect.data == "minari:pendulum/random-v0"
    with pytest.raises(UsageError, match="there are: pendulum/random-v0"):
        main([*options[:2], *offline, "--data", "minari:pendulum/other-v0"])
    with pytest.raises(UsageError, match="the data are of pendulum, not mountaincar"):
        main(["--env", "mountaincar", *offline, "--data", "minari:pendulum/random-v0"])
    with pytest.raises(UsageError, match="the run has pendulum, not mountaincar"):
        main(["--resume", str(tmp_path / "run"), "--env", "mountaincar"])
    with pytest.raises(UsageError, match="--data minari:pendulum/random-v0"):
        parse_arguments(["--data", "pendulum/random-v0", "--preset", "diffuser"])
    alone = parse_arguments(["--data", "minari:pendulum/random-v0", "--preset", "diffuser"])
    assert alone.config.env.name == "pendulum"
    assert alone.config.planner.kind == "diffuser"


def test_a_runs_replay_becomes_a_dataset(tmp_path, datasets, capsys):
    directory = tmp_path / "run"
    options = "--env pendulum --preset tiny --collect.episodes 2 --collect.seed-episodes 2"
    assert main([*options.split(), "--eval.every", "0", "--run-dir", str(directory)]) == 0
    name = "minari:pendulum/replay-v0"
    assert record_main([name, "--replay", str(directory)]) == 0
    assert "2 episodes, mean return -" in capsys.readouterr().out
    config = rundir.load_config(directory)
    env = make_env(config.env, training=True)
    interface = Interface(env.observation_space, env.action_space)
    for number, read in enumerate(read_recorded(name, interface, config)):
        own = npz.load_episode(directory, number, interface.example, config)
        np.testing.assert_array_equal(read.observations.vector, own.observations.vector)
        np.testing.assert_allclose(read.actions, own.actions, atol=1e-6)
        np.testing.assert_array_equal(read.rewards, own.rewards)
        assert (read.terminated, read.truncated) == (own.terminated, own.truncated)
    with pytest.raises(UsageError, match="exists already"):
        record_main([name, "--replay", str(directory)])
    with pytest.raises(UsageError, match="carracing is no run"):
        record_main(["minari:pendulum/other-v0", "--replay", "carracing"])


def test_a_replay_of_images_is_refused(tmp_path, datasets, monkeypatch):
    directory = tmp_path / "run"
    config = CONFIG.replace(env={"name": "carracing"})
    monkeypatch.setattr(stored, "open_agent", lambda _: StoredAgent("", config, lambda: ({}, "")))
    monkeypatch.setattr(rundir, "locate", lambda _: (directory, directory))
    monkeypatch.setattr(checkpoint, "verify", lambda _: [])
    with pytest.raises(UsageError, match="only a replay of vectors"):
        record_main(["minari:car/replay-v0", "--replay", str(directory)])
    monkeypatch.setattr(checkpoint, "verify", lambda _: ["it is damaged"])
    with pytest.raises(UsageError, match="it is damaged"):
        record_main(["minari:car/replay-v0", "--replay", str(directory)])


def test_a_dict_is_put_together_again():
    parts = {"a": gym.spaces.Box(-1, 1, (2, 2)), "b": gym.spaces.Box(-1, 1, (), np.float64)}
    interface = Interface(gym.spaces.Dict(parts), gym.spaces.Box(-1, 1, (1,)))
    seen = [{"a": np.full((2, 2), 0.1 * i, np.float32), "b": np.float64(i / 4)} for i in range(3)]
    back = interface.unobserve(np.stack([interface.observe(one).vector for one in seen]))
    for name in parts:
        np.testing.assert_array_equal(back[name], [one[name] for one in seen])
        assert back[name].dtype == parts[name].dtype


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Box(-1, 1, (3,)),
        gym.spaces.Box(0, 9, (2, 2), np.int64),
        gym.spaces.Box(0, 1, (16, 18, 3), np.float32),
        gym.spaces.Box(0, 255, (2, 3, 16, 18), np.uint8),
        gym.spaces.Dict(
            {
                "scalar": gym.spaces.Box(-1, 1, (), np.float64),
                "frames": gym.spaces.Box(0, 255, (16, 16), np.uint8),
            }
        ),
    ],
    ids=["vector", "integers", "float image", "stacked frames", "dict"],
)
def test_several_observations_become_what_each_does(space):
    interface = Interface(space, gym.spaces.Box(-1, 1, (1,)))
    space.seed(0)
    each = [space.sample() for _ in range(4)]
    together = each
    if isinstance(space, gym.spaces.Dict):
        together = {name: np.stack([one[name] for one in each]) for name in space}
    found = interface.observe_all(together)
    expected = jax.tree.map(lambda *x: np.stack(x), *[interface.observe(one) for one in each])
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.map(np.dtype, jax.tree.map(lambda x: x.dtype, found)) == jax.tree.map(
        lambda x: x.dtype, expected
    )


def test_observations_may_be_a_list_of_dicts():
    config = CONFIG.replace(model={"action_dim": 1})
    space = gym.spaces.Dict({"x": gym.spaces.Box(-9, 9, (2,))})
    interface = Interface(space, gym.spaces.Box(-1, 1, (1,)))
    seen = [{"x": np.full(2, i, np.float32)} for i in range(5)]
    steps = {"actions": np.zeros((4, 1), np.float32), "rewards": np.zeros(4)}
    ends = {"terminations": np.zeros(4, bool), "truncations": np.zeros(4, bool)}
    (episode,) = to_episodes(
        [types.SimpleNamespace(observations=seen, **steps, **ends)], interface, config
    )
    np.testing.assert_array_equal(episode.observations.vector[:, 0], np.arange(5))


@pytest.mark.parametrize(
    ("config", "data", "complaint"),
    [
        (
            OFFLINE,
            [recorded(10)],
            "has 18 steps, which .*: the longest has 10",
        ),
        (DIFFUSER, [recorded(seed=3)], "do not vary in dimension 0: .*safe-limits"),
        (DIFFUSER.replace(collect={"source": "environment"}), None, "need --data"),
        (
            DIFFUSER.replace(
                planner={"diffuser": DiffuserConfig(controller="waypoints")},
                model={"unet": UNetConfig(goal=1)},
            ),
            EPISODES,
            "not 1 numbers for 3",
        ),
        (
            DIFFUSER.replace(planner={"diffuser": DiffuserConfig(replan_distance=0.5)}),
            EPISODES,
            "replan-distance needs .*waypoints",
        ),
    ],
)
def test_data_that_cannot_be_learnt_from_are_refused(tmp_path, config, data, complaint):
    with pytest.raises(UsageError, match=complaint):
        run(tmp_path / "run", config.replace(collect={"data": ""}), data)


def test_other_data_are_not_taken_for_the_runs(offline, tmp_path):
    config, directory, *_ = offline
    longer = config.replace(collect={"episodes": 4})
    with pytest.raises(UsageError, match="not those that"):
        run(directory, longer, EPISODES[:3], resume=True)


def test_recorded_and_own_episodes_are_gathered_alike_on_host_and_device():
    config = CONFIG.replace(replay={"capacity": 2}, collect={"episodes": 3})
    given = to_episodes([recorded(seed=100 + seed) for seed in range(3)], interface(), config)
    own = to_episodes([recorded(seed=seed) for seed in range(3)], interface(), config)
    store = store_shapes(interface().example, config, recorded=[len(each) for each in given])
    store = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), store)
    replay = Replay(config)
    for add, episodes in ((replay.give, given), (replay.add, own)):
        for episode in episodes:
            store = store_episode(store, add(episode), episode)
    segments = replay.draw(np.random.default_rng(0), 64)
    ours, theirs = replay.gather(segments), gather(store, segments)
    jax.tree.map(np.testing.assert_array_equal, ours, jax.tree.map(np.asarray, theirs))
    seeds = set(ours.observations.vector[:, 0, 0].tolist())
    assert seeds == {1, 2, 100, 101, 102}


def test_a_half_export_keeps_diffusers_scalers_whole(offline, tmp_path):
    config, directory, state, _ = offline
    assert checkpoint_main([str(directory), "--export", str(tmp_path / "half"), "--half"]) == 0
    params = open_agent(tmp_path / "half").load(interface().example)
    assert ("scalers" in params) == config.diffuses_plans
    for name, tree in params.items():
        tolerance = 0 if name == "scalers" else 1e-3
        close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
        jax.tree.map(close, tree, state.acting[name])


def test_data_that_name_no_environment_need_one(datasets):
    class Still3(Still):
        def act(self, observation):
            return np.zeros(3, np.float32)

    data = ["--data", "minari:toy/mine-v0"]
    record(gym.wrappers.TimeLimit(Counting(), 5), Still3(), "toy/mine-v0", episodes=1)
    with pytest.raises(UsageError, match="does not say which environment"):
        parse_arguments(data)
    assert parse_arguments([*data, "--env", "pendulum"]).config.env.name == "pendulum"


def test_what_minari_cannot_keep_is_refused_before_it_is_recorded(datasets):
    gym.register("ByClass-v0", entry_point=Counting, max_episode_steps=5)
    with pytest.raises(UsageError, match="as 'module:Class'"):
        record(gym.make("ByClass-v0"), Still(), "toy/class-v0", episodes=1)


def test_a_share_of_random_actions_needs_others(datasets):
    with pytest.raises(UsageError, match="without one, all are random"):
        record_main(["minari:pendulum/half-v0", "--env", "pendulum", "--random", "0.5"])


def test_random_actions_in_place_of_a_controllers_are_of_the_whole_space():
    actions = gym.spaces.Box(-1, 1, (1,), np.float32)
    controller = _Random(actions, 0.3, 5, Still())
    taken = np.concatenate([controller.act(None) for _ in range(4000)])
    drawn = taken[taken != Still().act(None)]
    assert len(drawn) == pytest.approx(1200, abs=100)
    assert np.quantile(drawn, [0.1, 0.5, 0.9]) == pytest.approx([-0.8, 0, 0.8], abs=0.1)


def test_data_that_do_not_say_how_long_actions_were_held_fit_single_steps_alone(datasets):
    env = gym.wrappers.TimeLimit(gym.make("Pendulum-v1").unwrapped, 5)
    record(env, Still(), "toy/steps-v0", episodes=1)
    given = {"name": "pendulum", "action_repeat": 2}
    config = DIFFUSER.replace(env=given)
    interface = interface_of(lambda: gym.make("Pendulum-v1"))
    with pytest.raises(UsageError, match="for 2: give --env"):
        read_recorded("minari:toy/steps-v0", interface, config)
    read_recorded("minari:toy/steps-v0", interface, config.replace(env={"action_repeat": 1}))


def test_how_long_actions_were_held_outlasts_minaris_combining(datasets):
    import minari

    config = EnvConfig(name="pendulum", action_repeat=2, max_steps=10)
    for name in ("toy/a-v0", "toy/b-v0"):
        env = make_env(config, training=False)
        record(env, Still(), name, episodes=1, env_config=config)
    sets = [minari.load_dataset(name) for name in ("toy/a-v0", "toy/b-v0")]
    minari.combine_datasets(sets, "toy/both-v0")
    assert environment_of("minari:toy/both-v0") == {"name": "gym:Pendulum-v1", "action_repeat": 2}
    interface = interface_of(lambda: gym.make("Pendulum-v1"))
    ours = DIFFUSER.replace(env={"name": "pendulum", "action_repeat": 2})
    assert len(read_recorded("minari:toy/both-v0", interface, ours)) == 2
    with pytest.raises(UsageError, match="holds actions for 2 steps, and --env pendulum for 1"):
        read_recorded("minari:toy/both-v0", interface, ours.replace(env={"action_repeat": 1}))


def test_a_recorded_walker_can_be_made_again(datasets):
    import minari

    env = make_env(EnvConfig(name="bipedalwalker", max_steps=5), training=False)
    record(env, _Random(env.action_space, 1.0, 0), "toy/walker-v0", episodes=1)
    again = minari.load_dataset("toy/walker-v0").recover_environment()
    assert again.observation_space == env.observation_space


def test_data_alone_must_be_named(tmp_path):
    with pytest.raises(UsageError, match="needs --data minari:ID"):
        main(["--env", "pendulum", "--preset", "diffuser", "--run-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_recording_a_controller(datasets):
    import gymnasium as gym

    env = gym.make("Pendulum-v1", max_episode_steps=5)
    returns = record(env, Still(), "pendulum/still-v0", episodes=3, seed=4)
    assert returns.shape == (3,)
    assert environment_of("minari:pendulum/still-v0") == {"name": "gym:Pendulum-v1"}
    for name in ("still", "p/still-v0"):
        with pytest.raises(UsageError, match="no name of a dataset"):
            record(env, Still(), name, episodes=1)


class Stopped(Still):
    """Stands still until a signal comes."""

    left = 7

    def act(self, observation):
        self.left -= 1
        if not self.left:
            signal.raise_signal(signal.SIGINT)
        return super().act(observation)


def test_a_signal_ends_a_recording_and_keeps_it(datasets):
    import minari

    env = gym.make("Pendulum-v1", max_episode_steps=5)
    returns = record(env, Stopped(), "pendulum/cut-v0", episodes=9)
    episodes = list(minari.load_dataset("pendulum/cut-v0").iterate_episodes())
    assert [len(each.rewards) for each in episodes] == [5, 2]
    np.testing.assert_allclose(returns, [each.rewards.sum() for each in episodes], rtol=1e-6)


class Failing(Stopped):
    """Stands still until it fails."""

    def act(self, observation):
        if self.left == 2:
            raise RuntimeError("simulator")
        return super().act(observation)


def test_an_error_ends_a_recording_and_keeps_it(datasets):
    import minari

    env = gym.make("Pendulum-v1", max_episode_steps=5)
    with pytest.raises(RuntimeError, match="simulator") as failure:
        record(env, Failing(), "pendulum/cut-v0", episodes=9)
    assert failure.value.__notes__ == ["minari:pendulum/cut-v0 keeps the 1 episodes until then"]
    assert minari.load_dataset("pendulum/cut-v0").total_episodes == 1


def test_a_recording_that_a_signal_ends_has_another_status(datasets, monkeypatch, capsys):
    monkeypatch.setattr(record_module, "_Random", lambda *_: Stopped())
    assert record_main(["minari:pendulum/cut-v0", "--episodes", "9", "--env", "pendulum"]) == 130
    assert "stopped after 1 of 9" in capsys.readouterr().err


def test_a_name_that_is_taken_meanwhile_keeps_its_data(datasets):
    import minari

    env = gym.make("Pendulum-v1", max_episode_steps=5)

    class Slower(Still):
        def reset(self):
            record(env, Still(), "pendulum/both-v0", episodes=1)

    with pytest.raises(UsageError, match="exists already"):
        record(
            gym.make("Pendulum-v1", max_episode_steps=5), Slower(), "pendulum/both-v0", episodes=1
        )
    assert minari.load_dataset("pendulum/both-v0").total_episodes == 1


class Frames(gym.Env):
    """Noise as images."""

    observation_space = gym.spaces.Box(0, 255, (32, 32, 9), np.uint8)
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.integers(0, 256, (32, 32, 9), np.uint8), {}

    def step(self, action):
        return *self.reset()[:1], 0.0, False, False, {}


def test_frames_are_recorded_as_the_agent_sees_them(datasets):
    import minari

    seen = []

    class Watching(Still):
        def act(self, observation):
            seen.append(observation)
            return super().act(observation)

    env = gym.wrappers.TimeLimit(Frames(), 4)
    record(env, Watching(), "toy/frames-v0", episodes=1)
    (episode,) = minari.load_dataset("toy/frames-v0").iterate_episodes()
    np.testing.assert_array_equal(episode.observations[:-1], np.stack(seen))


def test_a_failed_write_leaves_nothing(datasets, monkeypatch):
    import minari

    def fail(self, path, metadata):
        (Path(path) / "data").mkdir(parents=True)
        raise OSError("full")

    env = gym.make("Pendulum-v1", max_episode_steps=5)
    with monkeypatch.context() as patch:
        patch.setattr(minari.DataCollector, "_save_to_disk", fail)
        with pytest.raises(OSError, match="full"):
            record(env, Still(), "pendulum/lost-v0", episodes=1)
    assert len(record(env, Still(), "pendulum/lost-v0", episodes=1)) == 1


def test_training_takes_the_settings_that_data_were_recorded_with(datasets):
    env_config = EnvConfig(name="pendulum", max_steps=20, action_repeat=4)
    env = own_env(make_env, env_config, training=True)
    record(env, Still(), "pendulum/held-v0", episodes=1, env_config=env_config)
    data = ["--data", "minari:pendulum/held-v0"]
    repeats = {
        name: parse_arguments([*options, *data]).config.env.action_repeat
        for name, options in {
            "its": [],
            "named": ["--env", "pendulum"],
            "another": ["--env", "mountaincar"],
        }.items()
    }
    assert repeats == {"its": 4, "named": 4, "another": 10}
    other = parse_arguments([*data, "--env.action-repeat", "2"]).config
    with pytest.raises(UsageError, match=r"recorded with --env.action-repeat 4, not 2"):
        read_recorded(data[1], Interface(env.observation_space, env.action_space), other)
