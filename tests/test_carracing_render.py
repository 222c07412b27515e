import copy
import math

import numpy as np
import pytest
from gymnasium.envs.box2d.car_racing import CarRacing

from valdi_jax.envs.carracing_render import FastCarRacing


def chase(env, step):
    """Follow the road, towards a point a few tiles ahead."""
    hull = env.car.hull
    track = np.array(env.track)[:, 2:]
    nearest = int(np.linalg.norm(track - hull.position, axis=1).argmin())
    x, y = track[(nearest + 4) % len(track)] - hull.position
    off = math.remainder(math.atan2(-x, y) - hull.angle, 2 * math.pi)
    return [-2 * off, 0.3 * (hull.linearVelocity.length < 45), 0]


def leave(env, step):
    """Straight ahead at full throttle, off the road and out of the playfield."""
    return [0, 1, 0]


def spin(env, step):
    """Full throttle with the wheel turned, to the other side now and then."""
    return [1 if step % 160 < 110 else -1, 1, 0]


def skid(env, step):
    """Follow the road at speed, with blocked wheels every second."""
    steer, _, _ = chase(env, step)
    return [steer, 0.8, 1.0 * (step % 50 > 35)]


def wander(env, step):
    """Random actions, new every ten steps, some out of range."""
    rng = np.random.default_rng([env.np_random_seed, step // 10])
    return rng.uniform([-1, -1, -1], [1, 1, 0.3])


POLICIES = [chase, leave, spin, skid, wander]


def pair(**settings):
    return CarRacing(**settings), FastCarRacing(**settings)


def compare(seed, policy, steps, **settings):
    """Step both side by side; returns whether any step was terminal, and the score."""
    reference, fast = pair(**settings)
    expected, _ = reference.reset(seed=seed)
    np.testing.assert_array_equal(fast.reset(seed=seed)[0], expected)
    ended, score = False, 0.0
    for step in range(steps):
        action = np.clip(policy(reference, step), -1, 1).astype(np.float32)
        (expected, *rest), (frame, *fast_rest) = reference.step(action), fast.step(action)
        np.testing.assert_array_equal(frame, expected, err_msg=f"track {seed}, step {step}")
        assert fast_rest == rest, f"track {seed}, step {step}"
        ended |= rest[1]
        score += rest[0]
    assert frame.dtype == expected.dtype
    assert frame.flags.writeable
    return ended, score


@pytest.mark.parametrize(
    ("seed", "policy", "steps"),
    [(0, chase, 200), (1, spin, 200), (2, skid, 150), (3, wander, 120)],
)
def test_a_rollout_matches_gymnasium_pixel_for_pixel(seed, policy, steps):
    compare(seed, policy, steps)


def test_a_rollout_out_of_the_playfield_matches_gymnasium():
    ended, _ = compare(6, leave, 190)
    assert ended


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
def test_whole_episodes_match_gymnasium_pixel_for_pixel(policy):
    for seed in range(100, 108):
        _, score = compare(seed, policy, 600)
        assert policy is not chase or score > 300, "a policy along the road must see much of it"


def test_colours_may_be_random():
    compare(5, spin, 60, domain_randomize=True)


def place(env, rng_seed):
    """Put the car anywhere, at any zoom, with any needles and score."""
    rng = np.random.default_rng(rng_seed)
    hull = env.car.hull
    near = env.track[rng.integers(len(env.track))][2:]
    anywhere = rng.uniform(-420, 420, 2)
    edge = np.where(rng.random(2) < 0.5, 1, -1) * rng.uniform(270, 345, 2)
    hull.position = tuple(float(c) for c in (near, anywhere, edge)[rng.integers(3)])
    # Vector2 handles rotations by multiples of a right angle separately.
    hull.angle = float(rng.choice([rng.uniform(-20, 20), rng.integers(-8, 8) * math.pi / 2]))
    hull.linearVelocity = tuple(rng.normal(0, 1, 2) * rng.choice([0.0, 1e-5, 20.0, 150.0]))
    hull.angularVelocity = float(rng.normal(0, 5))
    for wheel in env.car.wheels:
        wheel.omega = float(rng.choice([0, rng.normal(0, 50), rng.normal(0, 300)]))
        wheel.phase = float(rng.uniform(-10, 10))
        wheel.position = tuple(float(c) for c in hull.position + rng.normal(0, 4, 2))
    env.t = float(rng.choice([0, rng.uniform(0, 1.1), 30], p=[0.1, 0.3, 0.6]))
    env.reward = float(rng.choice([rng.uniform(-300, 1000), rng.uniform(-3, 3), 12345.6]))


def compare_places(seed, places):
    reference, fast = pair()
    reference.reset(seed=seed)
    fast.reset(seed=seed)
    overflows = 0
    for number in places:
        place(reference, number)
        place(fast, number)
        overflows += fast._bar_overflows()
        np.testing.assert_array_equal(
            fast._render("state_pixels"),
            reference._render("state_pixels"),
            err_msg=f"place {number}",
        )
    assert 0 < overflows < len(places) / 2, "high meters must occur, and not always"


def test_any_place_angle_zoom_and_needle_matches_gymnasium():
    compare_places(6, range(200))


@pytest.mark.slow
def test_many_more_places_match_gymnasium():
    for seed in range(7, 12):
        compare_places(seed, range(1000 * seed, 1000 * seed + 3000))


def test_a_car_beyond_the_range_of_pixel_coordinates_matches_gymnasium():
    reference, fast = pair()
    for env in (reference, fast):
        env.reset(seed=0)
        env.t = 30.0
    for x in (1500.0, 2050.0, 3000.0, 5000.0):
        for env in (reference, fast):
            env.car.hull.position = (x, -x / 3)
        np.testing.assert_array_equal(
            fast._render("state_pixels"), reference._render("state_pixels")
        )


def test_videos_match_the_parents():
    reference, fast = pair(render_mode="rgb_array")
    for env in (reference, fast):
        env.reset(seed=8)
    for step in range(6):
        action = np.array(spin(None, step), np.float32)
        np.testing.assert_array_equal(fast.step(action)[0], reference.step(action)[0])
        picture = fast.render()
        assert picture.shape == (400, 600, 3)
        np.testing.assert_array_equal(picture, reference.render())


def test_a_window_may_be_opened_and_closed(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    reference, fast = pair()
    window = FastCarRacing(render_mode="human")
    for env in (reference, fast, window):
        first, _ = env.reset(seed=9)
    action = np.array([0.5, 1, 0], np.float32)
    np.testing.assert_array_equal(window.reset(seed=9)[0], first)
    window.close()  # quits pygame, and with it the fonts of the others
    for _ in range(20):
        expected = reference.step(action)[0]
        np.testing.assert_array_equal(fast.step(action)[0], expected)


def test_skipping_frames_changes_nothing_else():
    reference, fast = pair()
    fast.skip_frames = True
    reference.reset(seed=10)
    assert not fast.reset(seed=10)[0].any()
    for step in range(75):
        action = np.array(skid(reference, step), np.float32)
        fast.skip_frames = step % 3 < 2
        (expected, *rest), (frame, *fast_rest) = reference.step(action), fast.step(action)
        assert fast_rest == rest
        if fast.skip_frames:
            assert frame.shape == expected.shape
            assert frame.dtype == expected.dtype
            assert not frame.any()
            frame = fast.frame()
        np.testing.assert_array_equal(frame, expected)


def test_nothing_is_drawn_before_the_first_reset():
    assert FastCarRacing(render_mode="state_pixels").render() is None


def test_a_copy_can_be_reset():
    _, fast = pair()
    first, _ = fast.reset(seed=11)
    np.testing.assert_array_equal(copy.deepcopy(fast).reset(seed=11)[0], first)
