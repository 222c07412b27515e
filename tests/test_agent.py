"""`Agent`, and what `plan` says of arguments that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import CONFIG, make_counting

from valdi_jax import Agent, Observation, init_params, plan
from valdi_jax.envs import evaluation_seeds
from valdi_jax.errors import UsageError
from valdi_jax.planners import PLANNERS
from valdi_jax.planners.base import Found, Planner
from valdi_jax.train import train

EXAMPLE = Observation(vector=np.zeros(2, np.float32))


@pytest.fixture(scope="module")
def pendulum():
    return Agent.load("pendulum")


@pytest.fixture(scope="module")
def params():
    return init_params(jax.random.key(0), EXAMPLE, config=CONFIG)


@pytest.fixture(scope="module")
def toy(params):
    return Agent(params, CONFIG, make=make_counting)


def test_acting_is_what_is_evaluated(pendulum):
    (expected,) = pendulum.evaluate(episodes=1)
    (seed,) = evaluation_seeds(1)
    env = pendulum.make_env()
    observation, _ = env.reset(seed=seed)
    pendulum.reset(key=jax.random.fold_in(jax.random.key(0), seed))
    total, actions, over = 0.0, [], False
    while not over:
        actions.append(pendulum.act(observation))
        observation, reward, terminated, truncated, _ = env.step(actions[-1])
        total, over = total + reward, terminated or truncated
    np.testing.assert_array_equal(np.stack(actions) / 2, expected.episode.actions)  # bounds: -2, 2
    assert total == pytest.approx(expected.episode.episode_return, abs=1e-2)


def test_each_row_acts_as_alone(toy):
    def observation(step, row):
        return {"vector": np.array([row, step], np.float64)}  # an environment may give float64

    keys = list(jax.random.split(jax.random.key(3), 3))
    alone = []
    for row, key in enumerate(keys):
        toy.reset(key=key)
        alone.append([toy.act(observation(step, row)) for step in range(5)])
    toy.reset(key=keys[0])
    toy.act({"vector": np.zeros((3, 2))})
    for row, key in enumerate(keys):
        toy.reset(row, key=key)
    together = []
    for step in range(5):
        several = np.stack([observation(step, row)["vector"] for row in range(3)])
        together.append(toy.act({"vector": several}))
    np.testing.assert_allclose(np.stack(together, 1), np.array(alone), atol=1e-5)


def test_a_list_of_observations_is_several(toy):
    each = [{"vector": np.array([row, 0.5])} for row in range(2)]
    toy.reset(key=jax.random.key(3))
    listed = toy.act(each)
    toy.reset(key=jax.random.key(3))
    np.testing.assert_array_equal(listed, toy.act({"vector": np.array([[0, 0.5], [1, 0.5]])}))


def test_a_row_begins_anew_while_the_others_go_on(toy):
    toy.reset()
    several = {"vector": np.zeros((2, 2))}
    chunk = [toy.act(several) for _ in range(CONFIG.model.chunk)]
    toy.reset()
    toy.reset(key=jax.random.key(1))
    first = toy.act(several)
    toy.reset([False, True], key=jax.random.key(2))
    second = toy.act(several)
    toy.reset(key=jax.random.key(1))
    same = [toy.act(several) for _ in range(2)]
    np.testing.assert_array_equal(first, same[0])
    np.testing.assert_array_equal(second[0], same[1][0])
    assert np.any(second[1] != same[1][1])
    assert len(chunk) == CONFIG.model.chunk


def test_episodes_differ_unless_they_have_one_key(toy):
    def first(**settings):
        toy.reset(**settings)
        return toy.act(EXAMPLE)

    assert np.any(first() != first())
    np.testing.assert_array_equal(first(key=jax.random.key(0)), first(key=jax.random.key(0)))


def test_a_whole_plan_does_not_change_what_comes_next(toy):
    toy.reset(key=jax.random.key(0))
    expected = [toy.act(EXAMPLE) for _ in range(4)]
    toy.reset(key=jax.random.key(0))
    found = []
    for _ in range(4):
        found.append(toy.act(EXAMPLE))
        assert toy.plan(EXAMPLE).actions.shape == (15, 3)
        assert toy.plan(Observation(vector=np.zeros((2, 2), np.float32))).mean.shape == (2, 15, 3)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (np.zeros(2), "'vector' is missing"),
        ({"vector": np.zeros(3)}, r"'vector' has the shape \(3,\)"),
        ({"vector": np.zeros((2, 2, 2))}, "'vector' has the shape"),
        ({"vector": np.full(2, np.nan)}, "not finite"),
        ([{"vector": np.zeros(2)}, {}], "the 2 observations differ: 'vector'"),
        (({"vector": np.zeros(2)}, {}), "'vector' is missing"),
        (Observation(vector=np.zeros(3, np.float32)), r"vector has the shape \(3,\)"),
        (Observation(image=np.zeros((8, 8, 3), np.uint8)), "image has the shape"),
    ],
)
def test_an_observation_that_does_not_fit_is_named(toy, observation, message):
    toy.reset()
    with pytest.raises(UsageError, match=message):
        toy.act(observation)


def test_what_reset_returns_is_no_observation(pendulum):
    pendulum.reset()
    with pytest.raises(UsageError, match="the tuple is no observation"):
        pendulum.act((np.zeros(3, np.float32), {}))


def test_no_episodes_cannot_be_evaluated(pendulum):
    with pytest.raises(UsageError, match="not 0"):
        pendulum.evaluate(episodes=0)
    with pytest.raises(UsageError, match="number of environments is 0"):
        pendulum.evaluate(episodes=1, num_envs=0)


def test_another_number_of_environments_needs_a_reset(toy):
    toy.reset()
    toy.act({"vector": np.zeros((2, 2))})
    with pytest.raises(UsageError, match="given 3 observations, and 2 before"):
        toy.act({"vector": np.zeros((3, 2))})


def test_rows_begin_only_where_there_are_some(toy):
    toy.reset()
    with pytest.raises(UsageError, match="needs an act"):
        toy.reset(0)
    toy.act({"vector": np.zeros((3, 2))})
    toy.reset((0, 2))
    toy.reset([])
    with pytest.raises(UsageError, match=r"rows \[1, 3\] of 3"):
        toy.reset([1, 3])
    with pytest.raises(UsageError, match="of no environments"):
        toy.act({"vector": np.zeros((0, 2))})


def test_the_size_of_actions_comes_from_the_environment(pendulum):
    config = pendulum.config.replace(model={"action_dim": 3})  # as in a preset
    agent = Agent(pendulum.params, config)
    assert agent.config.model.action_dim == 1
    with pytest.raises(UsageError, match="does not fit"):
        Agent({**pendulum.params, "value": {}}, config)


def test_an_agent_of_an_environment_of_ones_own_needs_its_factory(tmp_path):
    config = CONFIG.replace(collect={"episodes": 2}, eval={"every": 0})
    train(config, tmp_path / "run", make=make_counting)
    with pytest.raises(UsageError, match=r"toy\.make_counting makes: give it as make="):
        Agent.load(tmp_path / "run")
    agent = Agent.load(tmp_path / "run", make=make_counting)
    assert agent.act(agent.make_env().reset(seed=0)[0]).shape == (3,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"obs": EXAMPLE.vector}, "obs is an array: give Observation"),
        ({"obs": {"vector": EXAMPLE.vector}}, "obs is dict"),
        ({"obs": Observation(vector=np.zeros((4, 2), np.float32))}, "obs.vector has a batch axis"),
        ({"obs": Observation(image=np.zeros((9, 9, 3), np.float32))}, "obs.image is float32"),
        ({"key": 0}, "key is not a PRNG key"),
        ({"key": jax.random.split(jax.random.key(0))}, "key is not a PRNG key"),
        ({"noise_std": np.zeros(3, np.float32)}, "noise_std has the shape"),
        ({"params": {"policy": {}}}, "params are not those of all networks"),
        ({"obs": Observation(vector=np.zeros(3, np.float32))}, "obs does not fit the parameters"),
        ({"obs": Observation(image=np.zeros((9, 9, 3), np.uint8))}, "obs does not fit the param"),
        ({"carry": np.zeros(2)}, "carry is not that of a plan"),
    ],
)
def test_plan_names_the_argument_that_does_not_fit(params, change, message):
    given = {"params": params, "obs": EXAMPLE, "key": jax.random.key(0)} | change
    with pytest.raises(UsageError, match=message):
        plan(given.pop("params"), given.pop("obs"), given.pop("key"), config=CONFIG, **given)


def test_a_search_of_another_shape_is_named(params, monkeypatch):
    def search(problem, carry, key, *, config):
        return Found(jnp.zeros(3), None, jnp.zeros(3), jnp.zeros(3)), carry

    searcher = Planner(lambda shape, *, config: (), search, jnp.tanh)
    monkeypatch.setitem(PLANNERS, "other", searcher)
    config = CONFIG.replace(planner={"kind": "other"})
    with pytest.raises(UsageError, match=r"other found a sequence of the shape \(3,\)"):
        plan(params, EXAMPLE, jax.random.key(0), config=config)
