"""Layers shared by the networks, initialised as in the reference (PyTorch's defaults)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax.types import Array, Params

_FEW_CHANNELS = 4
_MOST_DRAWN = 2**20  # numbers in a sample of which only the start is taken
_CONVOLVE_TILE = 16  # images per matrix product


Initializer = Callable[..., Array]  # (key, shape, dtype) -> array


def kernel_init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Uniform in +-1/sqrt(fan_in), as PyTorch initialises kernels [..., in, features]."""
    bound = np.sqrt(np.float32(3) * np.float32(1 / 3 / math.prod(shape[:-1])))
    return _draw(jax.random.uniform, key, shape, dtype, -1.0, 1.0, scale=float(bound))


def uniform_init(fan_in: int) -> Initializer:
    """Uniform in +-1/sqrt(fan_in), as PyTorch initialises biases."""

    def initializer(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        bound = fan_in**-0.5
        return _draw(jax.random.uniform, key, shape, dtype, -bound, bound)

    return initializer


def normal_init(std: float) -> Initializer:
    """Normal with mean 0."""

    def initializer(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        return _draw(jax.random.normal, key, shape, dtype, scale=std)

    return initializer


def _draw(
    sample: Callable[..., Array],
    key: Array,
    shape: Sequence[int],
    dtype: Any,
    *bounds: float,
    scale: float = 1.0,
) -> Array:
    """A sample of a shape, times ``scale``, by one of few programs.

    Random numbers take long to compile, and networks have dozens of shapes. The sample is the start
    of a flat one of a size that many share: with JAX's default generator the numbers are the same.
    """
    if isinstance(key, jax.core.Tracer):
        return sample(key, tuple(shape), dtype, *bounds) * scale
    size, drawn = math.prod(shape), 32
    while drawn < size:
        drawn *= 8
    drawn = drawn if drawn <= _MOST_DRAWN else size
    flat = np.asarray(sample(key, (drawn,), dtype, *bounds))[:size]
    return jnp.asarray((flat * np.asarray(scale, flat.dtype)).reshape(shape))


def initialise(module: nn.Module, key: Array, *inputs: Any) -> Params:
    """Parameters of a network for inputs of these shapes, which it is not applied to."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    params = module.lazy_init(key, *shapes)["params"]
    return cast(Params, jax.tree.map(jnp.asarray, params))  # flax leaves some to NumPy


def apply(module: nn.Module, params: Params, *inputs: Any, dropout: Array | None = None) -> Array:
    """Apply a network that has no state besides its parameters; ``dropout`` is a PRNG key."""
    rngs = None if dropout is None else {"dropout": dropout}
    return cast(Array, module.apply({"params": params}, *inputs, rngs=rngs))


def on_last_axis(vector: Array | np.ndarray, like: Array) -> Array | np.ndarray:
    """Reshape [n] to [1, ..., 1, n] of the rank of ``like``, against rank promotion."""
    return vector.reshape((1,) * (like.ndim - 1) + (-1,))


def gelu(x: Array) -> Array:
    """GELU in the tanh approximation (paper, Table 2)."""
    return nn.gelu(x, approximate=True)


def layer_norm(use_bias: bool = True, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm with the reference's epsilon (linen's default is 1e-6)."""
    return nn.LayerNorm(epsilon=1e-5, use_bias=use_bias, name=name)


class Linear(nn.Module):
    """Affine map of the last axis: [..., in] -> [..., features]."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(
            self.features,
            use_bias=self.use_bias,
            kernel_init=kernel_init,
            bias_init=uniform_init(x.shape[-1]),
            name="dense",
        )(x)


def convolve(
    x: Array,
    kernel: Array,
    strides: tuple[int, int],
    padding: Sequence[tuple[int, int]],
    **settings: Any,
) -> Array:
    """`jax.lax.conv_general_dilated`, with faster forms on a CPU.

    A kernel as large as its input becomes one matrix product. XLA is slow on few input channels;
    there a kernel of 2 s - 1 pixels with stride s becomes a product of blocks (`_convolve_blocks`).

    Args:
        x: [B, height, width, in].
        kernel: [height, width, in, features].
        strides: along height and width.
        padding: before and after, along height and width.
        settings: of `jax.lax.conv_general_dilated`, without dilation or groups.

    Returns: [B, height', width', features].
    """

    def default(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **settings)

    stride = strides[0]
    padded = {amount for pair in padding for amount in pair}
    if x.shape[1:3] == kernel.shape[:2] and padded == {0}:
        cpu = _convolve_whole
    elif (
        x.shape[-1] <= _FEW_CHANNELS
        and strides == (stride, stride)
        and kernel.shape[:2] == (2 * stride - 1, 2 * stride - 1)
        and padded == {stride - 1}
    ):
        cpu = functools.partial(_convolve_blocks, default, stride)
    else:
        return default(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=cpu, default=default)


def _convolve_whole(x: Array, kernel: Array) -> Array:
    """Convolution with a kernel of the input's size: [B, h, w, in] -> [B, 1, 1, features]."""
    product = x.reshape(x.shape[0], -1) @ kernel.reshape(-1, kernel.shape[-1])
    return product[:, None, None, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolve_blocks(
    default: Callable[[Array, Array], Array], stride: int, x: Array, kernel: Array
) -> Array:
    """Convolution of stride s, kernel 2 s - 1 and padding s - 1, as a product of s x s blocks.

    Each output covers 2 x 2 input blocks. Every block is multiplied with all four parts of the
    kernel at once, and each output sums its four products.
    """
    _, height, width, channels = x.shape
    features = kernel.shape[-1]
    rows, columns = -(-height // stride), -(-width // stride)
    x = jnp.pad(x, ((0, 0), (0, rows * stride - height), (0, columns * stride - width), (0, 0)))
    kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0)))  # to 2 x 2 blocks
    kernel = kernel.reshape(2, stride, 2, stride, channels, features)
    kernel = kernel.transpose(1, 3, 4, 0, 2, 5).reshape(stride * stride * channels, 4 * features)

    def one(x: Array) -> Array:
        x = x.reshape(rows, stride, columns, stride, channels).transpose(0, 2, 1, 3, 4)
        x = x.reshape(rows, columns, stride * stride * channels)
        y = jnp.pad(x, ((1, 0), (1, 0), (0, 0))) @ kernel
        y = y.reshape(rows + 1, columns + 1, 4, features)
        return y[:-1, :-1, 0] + y[:-1, 1:, 1] + y[1:, :-1, 2] + y[1:, 1:, 3]

    # Tiled, because allocating memory for all products at once costs more than the products.
    return jax.lax.map(one, x, batch_size=_CONVOLVE_TILE)


def _convolve_blocks_forward(default, stride, x, kernel):
    return _convolve_blocks(default, stride, x, kernel), (x, kernel)


def _convolve_blocks_backward(default, stride, inputs, gradient):
    # XLA's own gradient is faster than that of the block product.
    return jax.vjp(default, *inputs)[1](gradient)


_convolve_blocks.defvjp(_convolve_blocks_forward, _convolve_blocks_backward)


class Conv(nn.Module):
    """Convolution in NHWC: [B, height, width, in] -> [B, height', width', features]."""

    features: int
    kernel: tuple[int, int]
    stride: int
    padding: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Conv(
            self.features,
            self.kernel,
            strides=(self.stride, self.stride),
            padding=[(self.padding, self.padding)] * 2,
            kernel_init=kernel_init,
            bias_init=uniform_init(math.prod(self.kernel) * x.shape[-1]),
            conv_general_dilated=convolve,
            name="conv",
        )(x)


class MLP(nn.Module):
    """Linear layers with GELU between them: [..., in] -> [..., widths[-1]]."""

    widths: Sequence[int]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, width in enumerate(self.widths):
            x = Linear(width, name=f"linear_{i}")(x if i == 0 else gelu(x))
        return x


class ResidualMLP(nn.Module):
    """Linear, ``depth`` residual blocks, linear: [..., in] -> [..., features].

    Each block adds LayerNorm -> linear to twice the width -> GELU -> linear (paper, Table 2).
    """

    width: int
    depth: int
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Linear(self.width, name="inputs")(x)
        for i in range(self.depth):
            h = layer_norm(name=f"norm_{i}")(x)
            x = x + MLP((2 * self.width, self.width), name=f"block_{i}")(h)
        return Linear(self.features, name="outputs")(x)
