"""The film of an agent's plans: where its paths lead, and where they are drawn."""

import importlib
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from imageio import v3 as imageio
from matplotlib.text import Text

from valdi_jax import Agent, cli, model
from valdi_jax.data.source import evaluation_jobs
from valdi_jax.errors import UsageError
from valdi_jax.planners import plan

SCRIPT = Path(__file__).parent.parent / "experiments/plan_video.py"
DECISIONS, CANDIDATES = 45, 3


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("plan_video")


@pytest.fixture(scope="module")
def job():
    return evaluation_jobs(1)[0]


@pytest.fixture
def swerving(script, monkeypatch):
    """In place of the model: full speed, then curves sharp enough to skid and leave the road."""

    def decide(params, observation, keys, decision, carry, *, config, candidates):
        rng = np.random.default_rng(int(decision))
        actions = np.tanh(rng.normal(size=(1 + candidates, *config.plan_shape)))
        actions[0] = [0.0, 1.0, 0.0]
        if decision > 20:
            actions[0] = [0.6 * (-1) ** (decision // 6), 0.5, -1.0]
        if decision > 40:
            actions[0] = [0.3, 0.0, 0.8]
        returns = np.arange(1.0 + candidates)
        return actions.astype(np.float32), carry, returns, 0.0, 0.0, np.zeros((5, 64))

    monkeypatch.setattr(script, "decide", decide)


def replay(agent, job, chunks):
    """A new environment after chunks of actions, and the car's position after each step."""
    env = agent.make_env()
    env.reset(seed=job.seed)
    env.skip_frames = True
    path = [tuple(env.unwrapped.car.hull.position)]
    for action in np.concatenate([np.zeros((0, 3), np.float32), *chunks]):
        env.step(action)
        path.append(tuple(env.unwrapped.car.hull.position))
    return env, np.array(path)


@pytest.mark.parametrize("repeat", [1, 2])
def test_paths_lead_where_the_sequences_do(script, job, swerving, repeat):
    stored = Agent.load("carracing")
    agent = Agent(stored.params, stored.config.replace(env={"action_repeat": repeat}))
    count, chunk = (DECISIONS if repeat == 1 else 12), agent.config.model.chunk
    made = list(script.drive(agent, job, decisions=count, candidates=CANDIDATES))
    executed = [one.actions[0, :chunk] for one in made]
    assert made[-1].paths.shape == (1 + CANDIDATES, 1 + 15 * repeat, 2)

    # The real drive is that of the actions alone.
    _, real = replay(agent, job, executed)
    np.testing.assert_array_equal([one.camera[:2] for one in made], real[:-1:chunk])
    # The chosen path passes where the car is when its first chunk is over.
    ends = np.array([one.paths[0, chunk * repeat] for one in made])
    np.testing.assert_allclose(ends, real[chunk::chunk], atol=1e-3)  # the car is 5 long
    # Candidates go where a replay goes, which is exact.
    for number in range(0, count, 11):
        np.testing.assert_array_equal(made[number].paths[:, 0], [real[number * chunk]] * 4)
        for actions, path in zip(made[number].actions, made[number].paths, strict=True):
            _, exact = replay(agent, job, [*executed[:number], actions])
            np.testing.assert_allclose(path[::repeat], exact[number * chunk :], atol=1e-3)


def test_the_road_is_projected_on_the_road(script, job):
    agent = Agent.load("carracing")
    checked = 0
    # The camera zooms in for 50 steps; then the car turns to a side.
    for straight, steering in ((10, 0.0), (60, -0.15), (60, 0.0), (60, 0.15)):
        chunks = [[[0.0, 0.5, 0.0]] * straight, [[steering, 0.0, 0.0]] * 15]
        env, _ = replay(agent, job, np.float32(np.concatenate(chunks))[None])
        frame = env.unwrapped.frame().astype(int)
        _, beta, x, y = np.array(env.unwrapped.track).T
        across = np.stack([np.cos(beta), np.sin(beta)], axis=-1)
        for side, on_road in ((-0.7, True), (0, True), (0.7, True), (-1.5, False), (1.5, False)):
            points = np.stack([x, y], axis=-1) + side * 40 / 6 * across  # half of the road's width
            seen = script.Camera.of(env.unwrapped).project(points)
            column, row = np.floor(96 * seen).astype(int).T
            inside = (column >= 0) & (column < 96) & (row >= 0) & (row < 62)  # above the car
            red, green, _ = frame[row[inside], column[inside]].T
            np.testing.assert_array_equal(green - red < 40, on_road)
            checked += inside.sum()
    assert checked > 100


def test_the_plan_comes_first_and_every_other_candidate_is_near_it(script):
    agent = Agent.load("lunarlander")
    observation = agent.make_env().reset(seed=0)[0]
    batch, _ = agent._observe(observation)
    observation = jax.tree.map(lambda x: x[0], batch)
    keys, config = (jax.random.key(0), jax.random.key(1)), agent.config.graph
    made = script.decide(
        agent.params, observation, keys, np.int32(3), None, config=config, candidates=8
    )
    actions, _, returns, _, _, imagined = jax.device_get(made)
    chosen = plan(agent.params, observation, jax.random.fold_in(keys[0], 3), config=config)
    np.testing.assert_allclose(actions[0], chosen.actions, atol=1e-5)
    apart = np.abs(actions[1:] - actions[0]).mean(axis=(1, 2))
    assert apart[::2].max() < apart[1::2].min()
    assert np.abs(actions).max() <= 1
    assert returns.shape == (9,)
    assert returns[0] > np.mean(returns[2::2])  # than those around zero
    # Its dynamics take no noise: these latents are all that the plan can lead to.
    z = model.encode(agent.params, observation, config=config)
    chunks = actions[0].reshape(config.model.horizon, -1)
    expected = model.imagine(
        agent.params["dynamics"], z, chunks, None, config=config.model, steps=1
    )
    np.testing.assert_allclose(imagined, expected, atol=1e-4)


def test_frames_show_the_chosen_path_in_white_ahead_of_the_car(script, job, swerving):
    agent = Agent.load("carracing")
    stops = iter([None] * 19 + [cli.Interrupted(signal.SIGINT)])

    def on_decision():
        if stop := next(stops):
            raise stop

    frames, made = script.film(
        agent, job, decisions=40, candidates=CANDIDATES, on_decision=on_decision
    )
    assert len(frames) == len(made) == 20  # those before the interruption are kept
    assert {frame.shape for frame in frames} == {(script.SIDE + script.STRIP, script.SIDE, 3)}
    rows, columns = np.nonzero((frames[-1][60 : script.SIDE - 60] > 250).all(axis=-1))
    rows = rows + 60
    middle, car = script.SIDE / 2, script.SIDE * 3 / 4
    assert abs(columns - middle).max() < 10  # it drives straight
    assert rows.max() < car + 5
    length = np.diff(made[-1].camera.project(made[-1].paths[0])[[-1, 0], 1]) * script.SIDE
    assert abs(car - rows.min() - length) < 5
    assert length > 40


def test_what_is_imagined_is_drawn_beside_what_came(script):
    def decode(latents):  # brightness
        return np.ones((8, 8, 3)) * latents[:, :, None, None]

    history = [
        SimpleNamespace(
            imagined=np.arange(1, 8)[:, None] / 10 + now / 100,
            seen=np.full((8, 8, 3), 100 + now, np.uint8),
        )
        for now in range(6)
    ]
    width, height = script.SIDE + script.COLUMN, script.SIDE + script.STRIP
    figure = script.Figure(figsize=(width / 100, height / 100), dpi=100)
    script.draw_pictures(figure, history, 2, chunk=6, decode=decode)
    imagined, came = figure.axes[::2], figure.axes[1::2]
    ahead = [1, 2, 4, 6, 7]
    titles = [panel.get_title("left") for panel in imagined]
    assert titles == [f"imagined, in {6 * h} frames" for h in ahead]
    for panel, h in zip(imagined, ahead, strict=True):
        np.testing.assert_allclose(panel.images[0].get_array(), h / 10 + 0.02)
    brightness = [int(image.get_array().mean()) for panel in came for image in panel.images]
    assert brightness == [103, 104]  # the film ends before the others
    assert [len(panel.images) for panel in came] == [1, 1, 0, 0, 0]

    # Nothing is cut, and nothing covers another.
    script.FigureCanvasAgg(figure).draw()
    titles = [text.get_window_extent() for text in figure.findobj(Text) if text.get_text()]
    assert len(titles) == 10
    boxes = np.array([box.extents for box in (*titles, *[panel.bbox for panel in figure.axes])])
    assert boxes[:, 0].min() >= script.SIDE
    assert boxes[:, 1].min() >= 0
    assert (boxes[:, 2:].max(axis=0) <= (width, height)).all()
    for at, (left, bottom, right, top) in enumerate(boxes):
        for left2, bottom2, right2, top2 in boxes[at + 1 :]:
            assert left >= right2 or left2 >= right or bottom >= top2 or bottom2 >= top


def test_what_cannot_be_filmed_is_refused(script, tmp_path):
    out = ["--out", str(tmp_path / "drive.gif")]
    for arguments, sentence in (
        (["pendulum", *out], "pendulum is an agent of .*carracing only"),
        (["carracing", "--out", "drive.avi"], "--out writes .gif or .mp4, not 'drive.avi'"),
        (["carracing", "--episode", "100", *out], "--episode is 100"),
        (["carracing", "--candidates", "0", *out], "--candidates is 0"),
        (
            ["carracing-mlp", "--decoder", str(SCRIPT.parent / "decoders/carracing"), *out],
            "another encoder than that of carracing-mlp",
        ),
    ):
        with pytest.raises(UsageError, match=sentence):
            script.main(arguments)


def test_a_quick_film_has_a_frame_for_each_decision(tmp_path):
    command = [sys.executable, SCRIPT, "carracing", "--quick", "--out", "drive.gif"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "drive.gif: 4 decisions of episode 0" in done.stdout
    assert imageio.imread(tmp_path / "drive.gif").shape == (
        4,
        544,
        592,
        3,
    )  # it comes with a decoder
