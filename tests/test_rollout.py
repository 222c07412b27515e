import dataclasses
import functools

import jax
import numpy as np
import pytest
from toy import CONFIG, Counting

from valdi_jax.config import CollectConfig
from valdi_jax.data.rollout import Job, exploration_noise, roll_out
from valdi_jax.envs.workers import LocalPool, Pool
from valdi_jax.errors import StoppedError
from valdi_jax.model import init_params
from valdi_jax.observation import Observation


class TwoLocal(Pool):
    """A pool of two environments in this process."""

    size = 2

    def __init__(self, *factories):
        self.pools = [LocalPool(factory) for factory in factories]

    def reset(self, seeds):
        return {i: self.pools[i].reset({0: seed})[0] for i, seed in seeds.items()}

    def send(self, actions):
        for i, chunk in actions.items():
            self.pools[i].send({0: chunk})

    def receive(self, indices):
        return {i: self.pools[i].receive([0])[0] for i in indices}

    def close(self):
        pass


@pytest.fixture(scope="module")
def params():
    example = Observation(vector=np.zeros(2, np.float32))
    return init_params(jax.random.key(0), example, config=CONFIG)


def jobs(*seeds):
    return [Job(seed, jax.random.key(seed)) for seed in seeds]


@pytest.mark.parametrize(
    ("length", "steps", "terminated"),
    [(100, 30, False), (30, 30, True), (7, 7, True), (1, 1, True)],
)
def test_an_episode_is_stored_with_its_true_length_and_flags(params, length, steps, terminated):
    pool = LocalPool(functools.partial(Counting, length=length))
    (driven,) = roll_out(params, pool, jobs(5), config=CONFIG)
    episode = driven.episode
    assert len(episode) == steps
    assert episode.terminated == terminated
    assert episode.truncated == (not terminated)
    assert episode.seed == 5
    assert episode.actions.shape == (steps, 3)
    np.testing.assert_array_equal(episode.rewards, np.arange(1, steps + 1))
    np.testing.assert_array_equal(episode.observations.vector[:, 1], np.arange(steps + 1))
    assert np.all(episode.observations.vector[:, 0] == 5)
    assert episode.episode_return == steps * (steps + 1) / 2


def test_an_episode_may_hold_only_the_last_observation(params):
    whole, short = (
        roll_out(params, LocalPool(Counting), jobs(5), config=CONFIG, keep_observations=keep)[0]
        for keep in (True, False)
    )
    np.testing.assert_array_equal(short.episode.actions, whole.episode.actions)
    np.testing.assert_array_equal(
        short.episode.observations.vector, whole.episode.observations.vector[-1:]
    )


def test_several_environments_roll_out_every_job_in_order(params):
    pool = TwoLocal(functools.partial(Counting, length=4), functools.partial(Counting, length=9))
    driven = roll_out(params, pool, jobs(1, 2, 3, 4, 5), config=CONFIG)
    assert [d.episode.seed for d in driven] == [1, 2, 3, 4, 5]
    for number, d in enumerate(driven, start=1):
        assert np.all(d.episode.observations.vector[:, 0] == number), "episodes were mixed up"
        np.testing.assert_array_equal(d.episode.rewards, np.arange(1, len(d.episode) + 1))


def test_groups_planned_for_in_turn_collect_the_same_episodes(params):
    factories = [functools.partial(Counting, length=n) for n in (4, 9)]
    together = roll_out(params, TwoLocal(*factories), jobs(1, 2, 3), config=CONFIG)
    in_turn = roll_out(params, TwoLocal(*factories), jobs(1, 2, 3), config=CONFIG, groups=2)
    assert [d.episode.seed for d in in_turn] == [1, 2, 3]
    for d in in_turn:
        match = [t.episode for t in together if t.episode.seed == d.episode.seed]
        shortest = min(len(d.episode), len(match[0]))  # either environment may have collected it
        np.testing.assert_allclose(
            d.episode.actions[:shortest], match[0].actions[:shortest], atol=1e-4
        )


def test_an_episode_does_not_depend_on_parallel_ones(params):
    alone = roll_out(params, LocalPool(Counting), jobs(3), config=CONFIG)[0].episode
    beside = roll_out(
        params, TwoLocal(functools.partial(Counting, length=5), Counting), jobs(2, 3), config=CONFIG
    )[1].episode
    np.testing.assert_allclose(alone.actions, beside.actions, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_each_environment_continues_from_its_own_plan(params, groups):
    config = CONFIG.replace(planner={"warm_start": True})
    cold = roll_out(params, LocalPool(Counting), jobs(3), config=CONFIG)[0].episode
    alone = roll_out(params, LocalPool(Counting), jobs(3), config=config)[0].episode
    # The second job starts after an episode of another length in the same environment.
    pool = TwoLocal(functools.partial(Counting, length=5), functools.partial(Counting, length=8))
    beside = roll_out(params, pool, jobs(1, 2, 3), config=config, groups=groups)[2].episode
    steps = len(beside)
    assert steps in (5, 8)
    np.testing.assert_allclose(alone.actions[:steps], beside.actions, atol=1e-4)
    np.testing.assert_array_equal(alone.actions[:3], cold.actions[:3])
    assert np.abs(alone.actions[3:6] - cold.actions[3:6]).max() > 0.05


def test_the_same_job_gives_the_same_episode(params):
    one, two = (
        roll_out(params, LocalPool(Counting), jobs(3), config=CONFIG, noise_std=0.2)[0].episode
        for _ in range(2)
    )
    np.testing.assert_array_equal(one.actions, two.actions)


def test_an_exception_in_the_callback_ends_the_rollouts(params):
    calls = []

    def stop():
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        roll_out(params, LocalPool(Counting), jobs(1), config=CONFIG, on_decision=stop)
    assert len(calls) == 3


def test_exploration_noise_is_held_and_then_decays():
    config = CollectConfig()
    episodes = (-10, 0, 249, 375, 500, 5000)
    noise = [exploration_noise(episode, config) for episode in episodes]
    np.testing.assert_allclose(noise, [0.25, 0.25, 0.25, 0.15, 0.05, 0.05])
    steady = dataclasses.replace(config, noise_decay=0)
    assert exploration_noise(300, steady) == pytest.approx(0.05)


class Losing(TwoLocal):
    """A pool that loses its first environment at given requests."""

    def __init__(self, *factories, resets=(), steps=()):
        super().__init__(*factories)
        self.losses = {"reset": resets, "step": steps}
        self.requests = {"reset": 0, "step": 0}

    def lose(self, kind, arguments):
        self.requests[kind] += 1
        lost = self.requests[kind] in self.losses[kind]
        return {i: value for i, value in arguments.items() if not (lost and i == 0)}

    def reset(self, seeds):
        return super().reset(self.lose("reset", seeds))

    def send(self, actions):
        self.kept = self.lose("step", actions)
        super().send(self.kept)

    def receive(self, indices):
        return super().receive(i for i in indices if i in self.kept)


@pytest.mark.parametrize("losses", [{"resets": (1,)}, {"steps": (2,)}, {"steps": (1, 3, 9)}])
def test_an_episode_lost_with_its_environment_restarts(params, losses):
    factory = functools.partial(Counting, length=7)
    undisturbed = roll_out(params, TwoLocal(factory, factory), jobs(1, 2, 3), config=CONFIG)
    driven = roll_out(params, Losing(factory, factory, **losses), jobs(1, 2, 3), config=CONFIG)
    assert [d.episode.seed for d in driven] == [1, 2, 3]
    for one, other in zip(driven, undisturbed, strict=True):
        np.testing.assert_array_equal(one.episode.rewards, other.episode.rewards)
        np.testing.assert_allclose(one.episode.actions, other.episode.actions, atol=1e-4)


def test_an_episode_that_always_loses_its_environment_is_given_up(params):
    pool = Losing(Counting, Counting, steps=range(100))
    with pytest.raises(StoppedError, match="the episode with the seed 1 lost its environment 5"):
        roll_out(params, pool, jobs(1, 2), config=CONFIG)
