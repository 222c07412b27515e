"""Every kind of observation and action, on Gymnasium's own environments if possible."""

import gymnasium as gym
import jax
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.wrappers import (
    AddRenderObservation,
    FrameStackObservation,
    GrayscaleObservation,
    RescaleAction,
    TransformObservation,
)
from toy import CONFIG

from valdi_jax.data.rollout import Job, roll_out
from valdi_jax.envs.spaces import Interface
from valdi_jax.envs.workers import LocalPool, Stepper
from valdi_jax.errors import UsageError
from valdi_jax.model import init_params

ONE = Box(-1, 1, (1,), np.float32)


def pendulum(**settings):
    return gym.make("Pendulum-v1", max_episode_steps=20, **settings)


def seen_by_camera():
    return AddRenderObservation(pendulum(render_mode="rgb_array"), render_only=True)


def carracing():
    env = gym.make("CarRacing-v3", max_episode_steps=20, disable_env_checker=True)
    env.action_space = Box(-1, 1, (3,), np.float32)
    return env


class ChannelsFirst(gym.ObservationWrapper):
    def __init__(self, env):
        super().__init__(env)
        self.observation_space = Box(0, 255, (3, 96, 96), np.uint8)

    def observation(self, frame):
        return np.moveaxis(frame, -1, 0)


ENVIRONMENTS = {
    "a vector": (pendulum, None, 3),
    "a stack of vectors": (lambda: FrameStackObservation(pendulum(), 4), None, 12),
    "a large colour image": (seen_by_camera, (500, 500, 3), None),
    "an image": (carracing, (96, 96, 3), None),
    "an image with channels first": (lambda: ChannelsFirst(carracing()), (96, 96, 3), None),
    "a grey image": (lambda: GrayscaleObservation(carracing()), (96, 96, 1), None),
    "a stack of grey images": (
        lambda: FrameStackObservation(GrayscaleObservation(carracing()), 4),
        (96, 96, 4),
        None,
    ),
    "a float image": (
        lambda: TransformObservation(
            carracing(), lambda x: (x / 255).astype(np.float32), Box(0, 1, (96, 96, 3), np.float32)
        ),
        (96, 96, 3),
        None,
    ),
    "an image and a vector": (
        lambda: AddRenderObservation(
            pendulum(render_mode="rgb_array"), render_only=False, render_key="camera"
        ),
        (500, 500, 3),
        3,
    ),
}


@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_an_agent_acts_on_every_kind_of_observation(kind):
    factory, image, vector = ENVIRONMENTS[kind]
    env = factory()
    interface = Interface(env.observation_space, env.action_space)
    example = interface.example
    assert (None if example.image is None else example.image.shape) == image
    assert (None if example.vector is None else example.vector.shape) == (vector and (vector,))
    if image:
        assert example.image.dtype == np.uint8

    config = CONFIG.replace(model={"action_dim": interface.action_dim})
    params = init_params(jax.random.key(0), example, config=config)
    embeddings = {"image_embedding", "vector_embedding"} & set(params["encoder"])
    assert len(embeddings) == (image is not None) + (vector is not None)
    (driven,) = roll_out(params, LocalPool(lambda: env), [Job(0, jax.random.key(0))], config=config)
    assert len(driven.episode) == 20
    if image:
        assert driven.episode.observations.image.shape == (21, *image)
        assert driven.episode.observations.image.std() > 1, "there is something to be seen"
    if vector:
        assert driven.episode.observations.vector.dtype == np.float32
        assert np.ptp(driven.episode.observations.vector[:, 0]) > 0


def test_a_float_image_is_the_same_image():
    plain, scaled = (Stepper(ENVIRONMENTS[kind][0]) for kind in ("an image", "a float image"))
    np.testing.assert_array_equal(plain.reset(5).image, scaled.reset(5).image)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_observation_that_is_not_finite_is_an_error_from_the_first_on(bad):
    image = Box(0, 1, (32, 32, 3), np.float32)
    for space in (Box(-np.inf, np.inf, (3,), np.float32), image):
        observation = np.zeros(space.shape, np.float32)
        observation[-1] = bad

        class Broken(gym.Env):
            observation_space, action_space = space, ONE

            def reset(self, *, seed=None, options=None, first=observation):
                return first, {}

        with pytest.raises(ValueError, match=f"observation is not finite: {bad}"):
            Stepper(Broken).reset(0)


def test_a_dicts_vectors_are_joined_in_its_order():
    spaces = Dict(b=Box(-1, 1, (2, 2)), a=Box(-9, 9, (), np.float64), c=Box(0, 9, (1,), np.int64))
    interface = Interface(spaces, ONE)
    vector = interface.observe(
        {"a": np.float64(7), "b": np.array([[1, 2], [3, 4]]), "c": np.array([5])}
    ).vector
    assert sorted(vector) == [1, 2, 3, 4, 5, 7]
    names = list(spaces.spaces)
    assert list(vector) == [
        x for name in names for x in {"a": [7], "b": [1, 2, 3, 4], "c": [5]}[name]
    ]


def test_an_observation_is_a_copy():
    frame = np.zeros((32, 32, 3), np.uint8)
    interface = Interface(Box(0, 255, frame.shape, np.uint8), ONE)
    image = interface.observe(frame).image
    frame += 1
    assert not image.any()


def test_actions_reach_the_bounds_of_the_environment():
    space = Box(np.array([[-2, 0], [5, -1]]), np.array([[2, 10], [5, 1]]), dtype=np.float64)
    act = Interface(Box(-1, 1, (1,)), space).act
    np.testing.assert_array_equal(act(-np.ones(4, np.float32)), space.low)
    np.testing.assert_array_equal(act(np.ones(4, np.float32)), space.high)
    np.testing.assert_array_equal(act(np.zeros(4, np.float32)), [[0, 5], [5, 0]])
    assert act(np.zeros(4, np.float32)).dtype == np.float64
    tight = Box(np.float32(-0.1), np.float32(0.3), (1,), np.float32)
    for action in np.linspace(-1, 1, 101, dtype=np.float32):
        assert tight.contains(Interface(ONE, tight).act(action[None]))


def test_actions_within_minus_one_and_one_pass_unchanged():
    actions = np.random.default_rng(0).uniform(-1, 1, 100).astype(np.float32)
    interface = Interface(ONE, ONE)
    for action in actions:
        assert interface.act(action[None])[0] == action


def test_a_rescaled_environment_acts_as_the_plain_one():
    actions = np.random.default_rng(0).uniform(-1, 1, (20, 1)).astype(np.float32)
    rewards = []
    for factory in (pendulum, lambda: RescaleAction(pendulum(), -1.0, 1.0)):
        stepper = Stepper(factory)
        stepper.reset(0)
        rewards.append(stepper.step(actions).rewards)
    np.testing.assert_allclose(rewards[0], rewards[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("observations", "actions", "message"),
    [
        (Discrete(3), ONE, "of the kind Discrete.*FlattenObservation"),
        (Dict(a=ONE, b=Dict(c=ONE)), ONE, "observation 'b' is of the kind Dict"),
        (Dict(), ONE, "no observations"),
        (
            Dict(left=Box(0, 255, (32, 32, 3), np.uint8), right=Box(0, 255, (32, 32), np.uint8)),
            ONE,
            "'left' and 'right' are both images",
        ),
        (Box(-np.inf, np.inf, (32, 32, 3)), ONE, "'observation' has infinite bounds"),
        (Box(0, 0, (32, 32, 3)), ONE, "no range"),
        (ONE, Discrete(3), "discrete.*ActionWrapper"),
        (ONE, Box(0, 3, (2,), np.int64), "discrete"),
        (ONE, Box(-1, np.inf, (2,)), "infinite bounds.*finite"),
    ],
)
def test_other_spaces_are_refused_in_one_sentence(observations, actions, message):
    with pytest.raises(UsageError, match=message) as caught:
        Interface(observations, actions)
    assert "\n" not in str(caught.value)
