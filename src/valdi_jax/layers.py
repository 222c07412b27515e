"""Layers shared by the networks, with the initialisation of the reference (PyTorch's defaults)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from valdi_jax.types import Array

# Uniform in +-1/sqrt(fan_in), which is what PyTorch's default amounts to for both layers below.
_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _bias_init(fan_in: int):
    def init(key, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def gelu(x: Array) -> Array:
    """GELU in the tanh approximation, as everywhere in the paper (Table 2)."""
    return nn.gelu(x, approximate=True)


def layer_norm(use_bias: bool = True, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm with the epsilon of the reference (linen's default is 1e-6)."""
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
            kernel_init=_kernel_init,
            bias_init=_bias_init(x.shape[-1]),
            name="dense",
        )(x)


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
            kernel_init=_kernel_init,
            bias_init=_bias_init(math.prod(self.kernel) * x.shape[-1]),
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

    A block adds LayerNorm -> linear to twice the width -> GELU -> linear (paper, Table 2).
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
