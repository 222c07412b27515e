import dataclasses

import numpy as np
import pytest
from toy import CONFIG

from valdi_jax.data.episode import Episode
from valdi_jax.data.replay import Replay
from valdi_jax.observation import Observation
from valdi_jax.presets import default_config

SPAN = CONFIG.segment_steps  # 18 environment steps


def episode(number, length, terminated=False):
    """An episode whose entries encode their episode and step."""
    steps = np.arange(length + 1, dtype=np.float32)
    return Episode(
        observations=Observation(vector=np.stack([np.full_like(steps, number), steps], axis=1)),
        actions=np.repeat(steps[:-1, None], 3, axis=1),
        rewards=steps[:-1],
        terminated=terminated,
        truncated=not terminated,
        seed=number,
    )


def filled(*episodes, capacity=10, bootstrap_terminal=True):
    config = dataclasses.replace(
        CONFIG,
        replay=dataclasses.replace(CONFIG.replay, capacity=capacity),
        learn=dataclasses.replace(CONFIG.learn, bootstrap_terminal=bootstrap_terminal),
    )
    replay = Replay(config)
    for each in episodes:
        replay.add(each)
    return replay


@pytest.mark.parametrize(("max_steps", "starts"), [(0, 68), (40, 68), (150, 99)])
def test_a_limit_of_the_runs_own_episodes_cuts_no_recorded_ones(max_steps, starts):
    """Diffuser's windows may reach beyond an end that comes before the longest episode's."""
    config = default_config("pendulum", "diffuser").replace(env={"max_steps": max_steps})
    replay = Replay(config, longest=100)
    replay.give(episode(0, 100))
    drawn = replay.draw(np.random.default_rng(0), 5000).steps[:, 0]
    assert set(drawn) == set(range(starts))


def sample(replay, seed, size):
    return replay.gather(replay.draw(np.random.default_rng(seed), size))


def test_a_segment_is_consecutive_and_within_one_episode():
    replay = filled(*(episode(i, length) for i, length in enumerate((18, 25, 40))))
    batch = sample(replay, 0, 500)
    vector = batch.observations.vector
    assert vector.shape == (500, 7, 2)
    assert batch.actions.shape == (500, 6, 9)
    assert batch.rewards.shape == (500, 6, 3)
    numbers, steps = vector[..., 0], vector[..., 1]
    assert np.all(numbers == numbers[:, :1])
    starts = steps[:, :1]
    np.testing.assert_array_equal(steps, starts + 3 * np.arange(7))
    np.testing.assert_array_equal(batch.rewards.reshape(500, 18), starts + np.arange(18))
    np.testing.assert_array_equal(batch.actions.reshape(500, 18, 3)[..., 0], starts + np.arange(18))


def test_episodes_are_drawn_uniformly_and_so_are_their_starts():
    replay = filled(episode(0, SPAN), episode(1, SPAN + 9))
    vector = sample(replay, 0, 4000).observations.vector
    assert np.mean(vector[:, 0, 0]) == pytest.approx(0.5, abs=0.05)
    starts = vector[vector[:, 0, 0] == 1][:, 0, 1]
    counts = np.bincount(starts.astype(int), minlength=10)
    assert len(counts) == 10, "every start must be drawn, the last one included"
    assert counts.min() > 0.6 * counts.mean()


def test_sampling_by_step_is_uniform_over_the_replay_buffer():
    # After the ring has wrapped, with an episode too short for a segment in between.
    config = CONFIG.replace(replay={"capacity": 4, "sampling": "step"})
    replay = Replay(config)
    for number, length in enumerate((50, SPAN, 5, SPAN + 8, SPAN + 29)):
        replay.add(episode(number, length))
    first = sample(replay, 0, 8000).observations.vector[:, 0]
    places, counts = np.unique(first, axis=0, return_counts=True)
    expected = [(1, 0)] + [(3, start) for start in range(9)] + [(4, start) for start in range(30)]
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_allclose(counts, 200, atol=70)  # five standard deviations


def test_only_the_segment_that_holds_the_terminal_step_is_marked():
    replay = filled(episode(0, SPAN + 3, terminated=True), episode(1, SPAN + 3))
    batch = sample(replay, 0, 500)
    first = batch.observations.vector[:, 0]
    expected = (first[:, 0] == 0) & (first[:, 1] == 3)
    assert 0 < expected.sum() < 500
    np.testing.assert_array_equal(batch.terminals[:, -1], expected)
    assert not batch.terminals[:, :-1].any()


@pytest.mark.parametrize("length", [1, 4, 18, 40])
def test_every_step_can_begin_a_segment_if_the_target_stops_at_terminals(length):
    replay = filled(episode(0, length, terminated=True), bootstrap_terminal=False)
    batch = sample(replay, 0, 2000)
    steps = batch.observations.vector[..., 1]
    starts = steps[:, 0].astype(int)
    assert set(starts) == set(range(length))
    np.testing.assert_array_equal(
        steps, np.minimum(starts[:, None] + 3 * np.arange(7), length), "the last is repeated"
    )
    # The chunk that holds the last step, by its number within the segment, if it is within.
    last = (length - 1 - starts) // 3
    np.testing.assert_array_equal(batch.terminals, last[:, None] == np.arange(6))
    numbers = starts[:, None] + np.arange(18)
    expected = np.where(numbers < length, numbers, 0)
    np.testing.assert_array_equal(batch.rewards.reshape(-1, 18), expected)
    np.testing.assert_array_equal(batch.actions.reshape(-1, 18, 3)[..., 2], expected)


def test_a_truncation_is_not_a_terminal():
    replay = filled(episode(0, SPAN + 5), bootstrap_terminal=False)
    batch = sample(replay, 0, 300)
    assert not batch.terminals.any()
    assert batch.observations.vector[:, 0, 1].max() == 5
    assert not filled(episode(0, SPAN - 1), bootstrap_terminal=False).ready


def test_an_episode_shorter_than_a_segment_is_never_drawn():
    replay = filled(episode(0, 5), episode(1, SPAN - 1), episode(2, SPAN))
    vector = sample(replay, 0, 100).observations.vector
    assert set(vector[..., 0].ravel()) == {2}
    assert len(replay) == 3


def test_a_replay_buffer_of_short_episodes_is_not_ready():
    replay = filled(episode(0, 5))
    assert not replay.ready
    with pytest.raises(ValueError, match="at least 18 steps"):
        sample(replay, 0, 4)


def test_the_oldest_episode_leaves_first():
    replay = filled(*(episode(i, SPAN) for i in range(5)), capacity=3)
    vector = sample(replay, 0, 200).observations.vector
    assert len(replay) == 3
    assert set(vector[..., 0].ravel()) == {2, 3, 4}


def test_the_same_generator_state_gives_the_same_batch():
    replay = filled(episode(0, 40), episode(1, 40))
    one, two = (sample(replay, 7, 16) for _ in range(2))
    np.testing.assert_array_equal(one.observations.vector, two.observations.vector)


@pytest.mark.parametrize(("length", "terminated"), [(31, False), (31, True), (4, True)])
def test_segments_start_at_kept_frames(length, terminated):
    config = CONFIG.replace(
        env={"render_every": "chunk"}, learn={"bootstrap_terminal": not terminated}
    )
    whole = episode(0, length, terminated)
    kept = [*range(0, length, 3), length]
    replay = Replay(config)
    replay.add(
        dataclasses.replace(whole, observations=Observation(vector=whole.observations.vector[kept]))
    )
    batch = sample(replay, 0, 300)
    steps = batch.observations.vector[..., 1]
    starts = steps[:, 0]
    assert set(starts) == set(range(0, length if terminated else length - SPAN + 1, 3))
    expected = np.minimum(starts[:, None] + 3 * np.arange(7), length)
    np.testing.assert_array_equal(steps, expected)
    rewards = starts[:, None] + np.arange(SPAN)
    np.testing.assert_array_equal(batch.rewards.reshape(300, SPAN), rewards * (rewards < length))
