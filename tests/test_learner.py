import io

import chex
import jax
import numpy as np
import pytest
from rich.console import Console
from test_update import EXAMPLE
from toy import CONFIG, make_counting

from valdi_jax import cli, updates
from valdi_jax.data.episode import Episode
from valdi_jax.data.replay import Replay
from valdi_jax.data.store import store_episode, store_shapes
from valdi_jax.dynamics import DYNAMICS
from valdi_jax.errors import StoppedError, UsageError
from valdi_jax.observation import Observation
from valdi_jax.run import learner as learner_module
from valdi_jax.run.learner import Learner, place
from valdi_jax.run.log import read_jsonl
from valdi_jax.train import train
from valdi_jax.updates import init_state

DEVICE = CONFIG.replace(replay={"placement": "device"}, learn={"updates_per_dispatch": 3})


def run(directory, episodes, config, resume=False):
    config = config.replace(collect={"episodes": episodes})
    return train(
        config,
        directory,
        resume=resume,
        make=make_counting,
        console=Console(file=io.StringIO()),
    )


def metrics(directory):
    return [
        {name: value for name, value in record.items() if not name.startswith(("time/", "memory/"))}
        for record in read_jsonl(directory / "metrics.jsonl")
    ]


def random_episode(seed, length=30, reward=1.0):
    rng = np.random.default_rng(seed)
    return Episode(
        observations=Observation(vector=rng.standard_normal((length + 1, 2)).astype(np.float32)),
        actions=rng.uniform(-1, 1, (length, 3)).astype(np.float32),
        rewards=np.full(length, reward, np.float32),
        terminated=False,
        truncated=True,
        seed=seed,
    )


def make_learner(config, directory, said=None):
    state = init_state(jax.random.key(0), EXAMPLE, config=config)
    say = (lambda sentence: None) if said is None else said.append
    return Learner(state, EXAMPLE, config=config, run_dir=directory, say=say)


def test_updates_from_the_device_equal_those_from_the_host(tmp_path):
    config = CONFIG.replace(replay={"capacity": 3})  # so that slots are reused
    each = {"host": [], "device": []}
    learners = {}
    for placement, values in each.items():
        placed = config.replace(replay={"placement": placement}, learn={"updates_per_dispatch": 4})
        learners[placement] = learner = make_learner(placed, tmp_path)
        for seed in range(5):
            learner.add(random_episode(seed, length=20 + seed))
            learner.learn(2 * seed, values)
    assert learners["host"].updates == learners["device"].updates == 8
    for host, device in zip(*each.values(), strict=True):
        for name, value in host.items():
            np.testing.assert_allclose(device[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    chex.assert_trees_all_close(
        learners["host"].state.params, learners["device"].state.params, atol=1e-5
    )


def test_one_compilation_serves_dispatches_of_any_length(tmp_path):
    learner = make_learner(DEVICE.replace(learn={"learning_rate": 2e-3}), tmp_path)
    learner.add(random_episode(0))
    before = updates._update_from_store._cache_size()
    each = []
    learner.learn(7, each)  # 3, 3 and 1
    assert len(each) == 7
    assert updates._update_from_store._cache_size() == before + 1


def test_one_compilation_serves_a_state_that_is_loaded_and_observes(tmp_path):
    config = CONFIG.replace(
        model={"normalize": True}, learn={"learning_rate": 3e-3}, checkpoint={"every": 1}
    )
    before = updates._jitted_update._cache_size()
    run(tmp_path / "run", 4, config)
    assert updates._jitted_update._cache_size() == before + 1
    run(tmp_path / "run", 6, config, resume=True)
    assert updates._jitted_update._cache_size() == before + 1


def test_a_resumed_run_from_the_device_equals_a_straight_one(tmp_path):
    straight = run(tmp_path / "straight", 5, DEVICE)
    run(tmp_path / "run", 3, DEVICE)
    resumed = run(tmp_path / "run", 5, DEVICE, resume=True)
    chex.assert_trees_all_equal(resumed.params, straight.params)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")


def test_a_non_finite_batch_on_the_device_is_kept_and_stops_the_run(tmp_path):
    config = DEVICE.replace(learn={"nonfinite_limit": 2})
    said = []
    learner = make_learner(config, tmp_path, said)
    learner.add(random_episode(0, reward=np.nan))
    before = jax.tree.map(np.array, learner.state.params)
    with pytest.raises(StoppedError, match="2 updates in a row were not finite"):
        learner.learn(9, [])
    chex.assert_trees_all_equal(learner.state.params, before)
    assert sorted(p.name for p in (tmp_path / "nonfinite").iterdir()) == [
        "00000001.npz",
        "00000002.npz",
    ]
    assert "loss/total" in said[0]


def test_the_replay_buffer_goes_to_the_device_only_if_it_fits(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": limits[-1], "bytes_in_use": 0}

    limits = []
    assert place(EXAMPLE, CONFIG) == "host", "on a CPU"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(store_shapes(EXAMPLE, CONFIG)))
    for limit, expected in ((int(0.9 * needed), "host"), (2 * needed, "device")):
        limits.append(limit)
        assert place(EXAMPLE, CONFIG) == expected
    assert place(EXAMPLE, CONFIG.replace(env={"max_steps": 0})) == "host"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"random_shift": 2}, "--learn.random-shift is for images"),
        ({"mirror": True}, "--learn.mirror is for carracing alone"),
    ],
)
def test_changes_of_images_need_images(change, message):
    with pytest.raises(UsageError, match=message):
        learner_module.check(EXAMPLE, CONFIG.replace(learn=change))


def test_a_store_needs_a_limit_on_episodes(tmp_path):
    with pytest.raises(UsageError, match=r"give --env\.max-steps"):
        place(EXAMPLE, DEVICE.replace(env={"max_steps": 0}))
    learner = make_learner(DEVICE, tmp_path)
    with pytest.raises(
        UsageError, match=r"31 steps, more than the 30 that --env\.max-steps allows"
    ):
        learner.add(random_episode(0, length=31))


def test_a_store_of_recorded_episodes_alone_is_as_long_as_the_longest():
    config = DEVICE.replace(env={"max_steps": 0}, collect={"source": "data"})
    assert place(EXAMPLE, config, [5, 7]) == "device"
    assert store_shapes(EXAMPLE, config, [5, 7]).rewards.shape == (2, 7)


def test_an_automatic_store_gives_way_to_longer_episodes(tmp_path, monkeypatch):
    monkeypatch.setattr(learner_module, "place", lambda example, config, recorded: "device")
    said = []
    learner = make_learner(CONFIG, tmp_path, said)
    learner.add(random_episode(0, length=31))
    assert learner.placement == "host"
    assert "31 steps" in said[0]
    learner.learn(1, [])
    assert learner.updates == 1


class PowerCut(BaseException):
    """Ends a run like a kill: nothing is saved on the way."""


LAGGING = CONFIG.replace(collect={"lag": 1}, eval={"every": 0})


def test_a_lag_leaves_every_update_due(tmp_path):
    state = run(tmp_path / "run", 5, LAGGING)
    assert int(state.step) == 9
    # An episode is collected during the updates of the previous one.
    assert [r["total/updates"] for r in metrics(tmp_path / "run")] == [0, 0, 0, 3, 9]


def test_rounds_plan_with_parameters_that_lack_the_updates_of_the_last_rounds(tmp_path):
    strict = run(tmp_path / "strict", 5, CONFIG.replace(eval={"every": 0}))
    run(tmp_path / "lag", 5, LAGGING)
    one, other = (metrics(tmp_path / name) for name in ("strict", "lag"))
    predicted = [[r["plan/predicted_return"] for r in records] for records in (one, other)]
    assert predicted[0][:3] == predicted[1][:3], "no update has been made yet"
    assert predicted[0][3] != predicted[1][3]
    assert int(strict.step) == 9


@pytest.mark.parametrize(
    ("lag", "behind"), [(0, [0] * 5), (1, [0, 0, 0, 3, 3]), (2, [0, 0, 0, 3, 6])]
)
def test_the_version_lag_counts_the_updates_that_a_round_lacks(tmp_path, lag, behind):
    run(tmp_path / "run", 5, LAGGING.replace(collect={"lag": lag}))
    assert [r["plan/version_lag"] for r in metrics(tmp_path / "run")] == behind


def test_a_network_that_no_resumed_run_could_load_is_refused_before_training(tmp_path, monkeypatch):
    mlp = DYNAMICS["mlp"]

    def init(key, *, config):
        return jax.tree.map(np.asarray, mlp.init(key, config=config))  # of tracers it fails

    monkeypatch.setitem(DYNAMICS, "mlp", mlp._replace(init=init))
    with pytest.raises(jax.errors.TracerArrayConversionError):
        run(tmp_path / "run", 2, CONFIG.replace(model={"dynamics": "mlp"}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_round_has_as_many_episodes_as_requested(tmp_path):
    config = CONFIG.replace(collect={"episodes_per_round": 3}, eval={"every": 0})
    run(tmp_path / "run", 7, config)
    # Two seed episodes owe nothing; the updates of a round follow when it is complete.
    totals = [r["total/updates"] for r in metrics(tmp_path / "run")]
    assert totals == [3, 3, 3, 12, 12, 12, 15]


@pytest.mark.parametrize(("lag", "episodes"), [(1, 3), (1, 4), (3, 5)])
def test_a_resumed_lagging_run_equals_a_straight_one(tmp_path, lag, episodes):
    config = LAGGING.replace(checkpoint={"every": 1}, collect={"lag": lag})
    straight = run(tmp_path / "straight", 6, config)
    stopped = []

    def make(env_config, training):
        env = make_counting(env_config, training=training)
        reset = env.reset

        def failing(**kwargs):
            stopped.append(kwargs)
            if len(stopped) > episodes:
                raise PowerCut
            return reset(**kwargs)

        env.reset = failing
        return env

    with pytest.raises(PowerCut):
        train(
            config.replace(collect={"episodes": 6}),
            tmp_path / "run",
            make=make,
            console=Console(file=io.StringIO()),
        )
    resumed = run(tmp_path / "run", 6, config, resume=True)
    chex.assert_trees_all_equal(resumed.params, straight.params)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")


@pytest.mark.parametrize("lag", [1, 3])
def test_a_lagging_run_that_a_signal_ends_within_its_updates_resumes_exactly(
    tmp_path, monkeypatch, lag
):
    config = LAGGING.replace(collect={"lag": lag})
    straight = run(tmp_path / "straight", 6, config)
    update = learner_module.update

    def interrupting(state, batch, *, config):
        if int(state.step) == 4:
            raise cli.Interrupted(2)
        return update(state, batch, config=config)

    monkeypatch.setattr(learner_module, "update", interrupting)
    with pytest.raises(cli.Interrupted):
        run(tmp_path / "run", 6, config)
    monkeypatch.undo()
    state = run(tmp_path / "run", 6, config, resume=True)
    assert int(state.step) == 12
    chex.assert_trees_all_equal(state.params, straight.params)
    assert [r["episode"] for r in metrics(tmp_path / "run")] == list(range(6))


def test_a_run_that_keeps_every_third_frame_resumes_exactly(tmp_path):
    config = CONFIG.replace(env={"render_every": "chunk", "max_steps": 31})
    straight = run(tmp_path / "straight", 5, config)
    run(tmp_path / "run", 3, config)
    resumed = run(tmp_path / "run", 5, config, resume=True)
    chex.assert_trees_all_equal(resumed.params, straight.params)


def test_a_full_slot_is_replaced_completely():
    config = DEVICE.replace(collect={"episodes": 2})
    store = jax.tree.map(lambda x: jax.numpy.ones(x.shape, x.dtype), store_shapes(EXAMPLE, config))
    replay = Replay(config)
    store = store_episode(store, replay.add(random_episode(1)), random_episode(2, length=20))
    assert store.rewards.shape == (2, 30)
    assert not np.any(store.rewards[0, 20:])
    assert np.all(store.rewards[1] == 1)
