"""The script of the paper's Figure 5: what it measures, chooses, refuses and draws."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from valdi_jax import Agent
from valdi_jax.data.episode import Episode
from valdi_jax.errors import UsageError
from valdi_jax.networks.decoder import Decoder, decode, init_decoder
from valdi_jax.observation import Observation

ROOT = Path(__file__).parent.parent
TINY = Decoder((8, 12), width=16, depth=1, heads=2, hidden=24)


@pytest.fixture
def script(monkeypatch):
    """Import an experiment as it is imported when started: its folder leads the path."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    return importlib.import_module


@pytest.fixture
def futures(script):
    return script("diverse_futures")


@pytest.fixture
def picture():
    """A smooth image [20, 24, 3] with contrast."""
    rows, columns, colours = np.meshgrid(np.arange(20), np.arange(24), np.arange(3), indexing="ij")
    return jnp.float32(0.5 + 0.3 * np.sin(0.5 * rows + 0.8 * columns + colours))


@pytest.fixture
def noise():
    return jax.random.normal(jax.random.key(0), (20, 24, 3))


def windowed_ssim(x, y):
    """The definition, window by window."""
    x, y, found = np.float64(x), np.float64(y), []
    for top in range(x.shape[0] - 6):
        for left in range(x.shape[1] - 6):
            for colour in range(3):
                a, b = (image[top : top + 7, left : left + 7, colour].ravel() for image in (x, y))
                (var_a, covariance), (_, var_b) = np.cov(a, b)
                light = (2 * a.mean() * b.mean() + 1e-4) / (a.mean() ** 2 + b.mean() ** 2 + 1e-4)
                found.append(light * (2 * covariance + 9e-4) / (var_a + var_b + 9e-4))
    return np.mean(found)


def test_ssim_is_that_of_its_definition(futures, picture, noise):
    np.testing.assert_allclose(futures.ssim(picture, picture), 1, atol=1e-5)
    for other in (picture + 0.1 * noise, picture[::-1], 0.5 * picture):
        expected = windowed_ssim(picture, other)
        assert expected < 0.95
        np.testing.assert_allclose(futures.ssim(picture, other), expected, atol=1e-4)
        np.testing.assert_allclose(futures.ssim(other, picture), expected, atol=1e-4)


def test_ssim_falls_with_noise_and_hardly_with_brightness(futures, picture, noise):
    little, much, unlike = (
        float(futures.ssim(picture, picture + scale * noise)) for scale in (0.02, 0.1, 10)
    )
    assert 1 > little > much > unlike
    assert abs(unlike) < 0.1
    brighter = float(futures.ssim(picture, picture + 0.1))  # the same error as much noise
    assert brighter > 0.95 > much
    level = jnp.full((8, 8, 3), 0.5)  # without contrast, the means alone count
    expected = (2 * 0.5 * 0.25 + 1e-4) / (0.5**2 + 0.25**2 + 1e-4)
    np.testing.assert_allclose(futures.ssim(level, level / 2), expected, rtol=1e-5)


def test_ssim_falls_with_a_shift(futures, picture):
    once, twice = (
        float(futures.ssim(picture[:, :-2], picture[:, shift : 22 + shift])) for shift in (1, 2)
    )
    assert 1 > once > twice
    with pytest.raises(ValueError, match="no window"):
        futures.ssim(picture[:6], picture[:6])


def test_distances_are_of_all_pairs(futures):
    images = jnp.stack([jnp.full((8, 8, 3), level) for level in (0, 0.5, 0.8)])
    apart = futures.distances(images, distance=futures.pixel_distance)
    np.testing.assert_allclose(apart, [[0, 0.5, 0.8], [0.5, 0, 0.3], [0.8, 0.3, 0]], atol=1e-6)
    assert futures.mean_distance(np.asarray(apart)) == pytest.approx(1.6 / 3)
    similarity = futures.distances(images, distance=futures.ssim_distance)
    assert similarity[2, 1] == pytest.approx(1 - float(futures.ssim(images[1], images[2])))
    numbers, pixels = futures.measure(jnp.array([[0.0, 0], [6, 8], [0, 8]]), images)
    np.testing.assert_array_equal(pixels, apart)
    assert numbers["pixels"] == pytest.approx(1.6 / 3)
    assert numbers["one_minus_ssim"] == pytest.approx(float(similarity.sum()) / 6)
    assert numbers["latents"] == pytest.approx(8 / np.sqrt(2))  # distances 10, 8 and 6


def test_the_least_alike_begin_with_the_furthest_pair(futures):
    places = np.array([[4, 0], [0, 0], [9, 0], [4, 3], [8, 0], [10, 0]])
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1)
    # 1 and 5 are 10 apart. From the nearer of them, 3 is 5 away, and 0 then 3 from that.
    assert futures.least_alike(apart, 4) == [1, 5, 3, 0]
    assert sorted(futures.least_alike(np.zeros((4, 4)), 4)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("steps", "left"), [pytest.param(30, 1, id="whole"), pytest.param(28, 0, id="cut")]
)
def test_states_are_shown_with_the_frames_after_them(futures, steps, left):
    sizes = Agent.load("carracing").config.model
    assert (sizes.chunk, sizes.horizon) == (3, 5)
    image = np.random.default_rng(0).integers(256, size=(11, 48, 48, 3), dtype=np.uint8)
    episode = Episode(
        observations=Observation(image=image, vector=None),
        actions=np.zeros((steps, sizes.action_dim), np.float32),
        rewards=np.zeros(steps, np.float32),
        terminated=False,
        truncated=True,
        seed=0,
    )
    states = futures.evidence.States(episode, [0, 4, 9], None, None, None)
    for pair, expected in enumerate((image[:6], image[4:10], image[9 : 10 + left])):
        np.testing.assert_array_equal(futures.frames_after(states, pair, sizes), expected)


def save_tiny(script, directory, agent, digest=None):
    """A decoder that learned nothing."""
    directory.mkdir(exist_ok=True)
    params = init_decoder(jax.random.key(0), agent.config.model.latent_dim, decoder=TINY)
    decoders = script("decoder")
    record = {"agent": "mine", "encoder_sha256": digest or decoders.encoder_digest(agent)}
    decoders.save(directory, params, record, decoder=TINY, half=False)


def test_what_cannot_be_compared_is_refused(script, futures, tmp_path):
    agent = Agent.load("carracing")
    save_tiny(script, tmp_path, agent)
    _, decoder, _ = futures.open_both("carracing", tmp_path)
    assert decoder == TINY
    with pytest.raises(UsageError, match="mlp dynamics: they imagine one future"):
        futures.open_both("carracing-mlp", tmp_path)
    save_tiny(script, tmp_path, agent, digest="0" * 64)
    with pytest.raises(UsageError, match=r"another encoder than that of carracing: .* for mine"):
        futures.open_both("carracing", tmp_path)
    with pytest.raises(UsageError, match="not a whole decoder"):
        futures.open_both("carracing", tmp_path / "none")
    for option in ("--steps", "--rollouts", "--pairs"):
        with pytest.raises(UsageError, match=f"{option} is 0"):
            futures.parse_arguments(["carracing", "d", "--out", "o.png", option, "0"])


def test_rows_of_the_picture_are_aligned_and_keep_their_order(futures, monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(futures.plt, "close", shown.append)
    real = np.arange(2)[:, None, None, None] * np.full((8, 8, 3), 200, np.uint8)
    imagined = np.linspace(0, 1, 12).reshape(4, 3, 1, 1, 1) * np.ones((8, 8, 3))
    futures.draw(tmp_path / "o.png", real.astype(np.uint8), imagined, "title")
    monkeypatch.undo()
    (figure,) = shown
    panels = np.array(figure.axes).reshape(5, 3)
    assert [panel.get_title() for panel in panels[0]] == ["t", "t + 1", "t + 2"]
    names = [panel.get_ylabel() for panel in panels[:, 0]]
    assert names == ["real", "future 1", "future 2", "future 3", "future 4"]
    assert [len(panel.images) for panel in panels[0]] == [1, 1, 0]  # the episode ended
    for panel, image in zip(panels[1:].ravel(), imagined.reshape(12, 8, 8, 3), strict=True):
        np.testing.assert_allclose(panel.images[0].get_array(), image)
    boxes = np.array([[panel.get_position().bounds for panel in line] for line in panels])
    np.testing.assert_allclose(boxes[..., 0], np.broadcast_to(boxes[:1, :, 0], (5, 3)))
    np.testing.assert_allclose(boxes[..., 1], np.broadcast_to(boxes[:, :1, 1], (5, 3)))
    futures.plt.close(figure)


def test_futures_are_measured_and_drawn(script, tmp_path):
    save_tiny(script, tmp_path / "decoder", Agent.load("carracing"))
    name = "diverse_futures.py"
    command = [sys.executable, ROOT / "experiments" / name, "carracing", "decoder", "--quick"]
    options = ["--out", "futures.png", "--json", "futures.json"]
    done = subprocess.run(
        [*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "futures.json").read_text(), parse_constant=pytest.fail)
    assert data["command"] == " ".join(
        ["python", f"experiments/{name}", "carracing", "decoder", "--quick", *options]
    )
    rows = data["rows"]
    assert [(row["steps"], row["pair"], row["decision"]) for row in rows] == [(1, 0, 0), (1, 1, 19)]
    for row in rows:
        assert row["rollouts"] == 20
        for number in ("pixels", "one_minus_ssim", "latents"):
            assert 0 < row[number] < 1
    mean = np.mean([row["latents"] for row in rows])
    assert f" | {mean:.4f} | 0.006 |" in done.stdout
    height, width, _ = imread(tmp_path / "futures.png").shape
    assert width > height > 500  # 6 columns, 5 rows


def test_the_picture_is_of_the_state_whose_futures_differ_most(
    script, futures, monkeypatch, tmp_path
):
    agent, drawn = Agent.load("carracing"), []
    save_tiny(script, tmp_path, agent)
    sizes = agent.config.model
    z = jax.random.normal(jax.random.key(1), (4, sizes.latent_dim))[jnp.array([1, 2, 0, 3])]
    chunks = jnp.zeros((4, sizes.horizon, sizes.chunk * sizes.action_dim))
    states = futures.evidence.States(None, [0, 3, 6, 9], z, None, chunks)
    monkeypatch.setattr(futures.evidence, "states", lambda agent, count: states)
    monkeypatch.setattr(futures, "frames_after", lambda states, pair, sizes: "abcd"[pair])
    monkeypatch.setattr(futures, "draw", lambda *inputs: drawn.append(inputs))
    out, kept = tmp_path / "o.png", tmp_path / "o.json"
    options = ["--steps", "2", "1", "--rollouts", "5", "--out", str(out), "--json", str(kept)]
    assert futures.main(["carracing", str(tmp_path), *options]) == 0
    rows = json.loads(kept.read_text())["rows"]
    assert [(row["steps"], row["pair"]) for row in rows] == [
        (s, p) for s in (2, 1) for p in range(4)
    ]
    pixels = [row["pixels"] for row in rows[4:]]
    most = int(np.argmax(pixels))
    assert 0 < most < 3, pixels
    ((path, frames, images, title),) = drawn
    assert (path, frames) == (out, "abcd"[most])
    assert f"steps: 1; 4 of 5 futures from decision t = {states.decisions[most]};" in title

    decoder, params, _ = script("decoder").load(tmp_path)
    config = agent.config.replace(planner={"diffusion_steps": 1}).graph
    key = jax.random.key(0)
    latents = script("steps_sweep").imagine(
        agent.params, z, chunks, key, config=config, rollouts=5
    )[most]
    every = decode(params, latents, decoder=decoder)
    last = np.asarray(every[:, -1])
    apart = np.sqrt(np.square(last[:, None] - last[None]).mean(axis=(2, 3, 4)))
    assert apart.sum() / 20 == pytest.approx(pixels[most], rel=1e-3)
    np.testing.assert_allclose(
        images[:, 1:], every[np.array(futures.least_alike(apart, 4))], atol=1e-5
    )
    now = decode(params, z[most], decoder=decoder)
    np.testing.assert_allclose(images[:, 0], np.broadcast_to(now, images[:, 0].shape), atol=1e-5)
