"""Diffuser's networks over plans (Janner et al., 2022): temporal U-Net and value."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax.networks.layers import Linear, layer_norm, uniform_init
from valdi_jax.types import Array

_GROUPS = 8  # of a GroupNorm
_EMBEDDING = 32  # size of the embedded timestep
_HEADS, _HEAD_SIZE = 4, 32  # of the attention


def unfold(x: Array, kernel: int, stride: int = 1) -> Array:
    """Windows of ``kernel`` steps around every ``stride``-th: [B, H, C] -> [B, H', kernel * C].

    Beyond the ends there are zeros. With it a convolution over time is one matrix product, whose
    gradient is fast on CPUs too.
    """
    length = x.shape[1]
    padded = jnp.pad(x, ((0, 0), (kernel // 2, kernel // 2), (0, 0)))
    return jnp.concatenate([padded[:, k : k + length : stride] for k in range(kernel)], axis=-1)


class TimeConv(nn.Module):
    """Convolution over time with an odd kernel: [B, H, in] -> [B, H / stride, features]."""

    features: int
    kernel: int = 5
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return Linear(self.features, name="linear")(unfold(x, self.kernel, self.stride))


class Upsample(nn.Module):
    """Transposed convolution, kernel 4, stride 2, padding 1: [B, H, C] -> [B, 2 H, C].

    An even output covers its input and the one before, an odd output its input and the next.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        init = uniform_init(4 * channels)
        even = self.param("even", init, (2 * channels, channels))
        odd = self.param("odd", init, (2 * channels, channels))
        bias = self.param("bias", init, (channels,))
        around = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
        before, after = around[:, :-2], around[:, 2:]
        outputs = [
            jnp.concatenate([before, x], axis=-1) @ even,
            jnp.concatenate([x, after], axis=-1) @ odd,
        ]
        y = jnp.stack(outputs, axis=2) + bias.reshape(1, 1, 1, -1)
        return y.reshape(x.shape[0], -1, channels)


class ConvBlock(nn.Module):
    """Convolution over time, GroupNorm, Mish: [B, H, in] -> [B, H, features]."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = TimeConv(self.features, name="conv")(x)
        norm = nn.GroupNorm(_GROUPS, epsilon=1e-5, use_fast_variance=False, name="norm")
        return jax.nn.mish(norm(x))


class ResidualBlock(nn.Module):
    """Two `ConvBlock`s and a skip; the embedded timestep t [B, 32] is added between them."""

    features: int

    @nn.compact
    def __call__(self, x: Array, t: Array) -> Array:
        shift = Linear(self.features, name="time")(jax.nn.mish(t))
        h = ConvBlock(self.features, name="block_0")(x) + shift[:, None]
        h = ConvBlock(self.features, name="block_1")(h)
        if x.shape[-1] != self.features:
            x = Linear(self.features, name="skip")(x)
        return h + x


class LinearAttention(nn.Module):
    """x [B, H, C] plus linear attention over time, whose cost grows with H alone."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, length, channels = x.shape
        normed = layer_norm(name="norm")(x)
        qkv = Linear(3 * _HEADS * _HEAD_SIZE, use_bias=False, name="qkv")(normed)
        queries, keys, values = jnp.moveaxis(
            qkv.reshape(batch, length, 3, _HEADS, _HEAD_SIZE), 2, 0
        )
        context = jnp.einsum("bnhd,bnhe->bhde", jax.nn.softmax(keys, axis=1), values)
        out = jnp.einsum("bhde,bnhd->bnhe", context, queries * _HEAD_SIZE**-0.5)
        return x + Linear(channels, name="outputs")(out.reshape(batch, length, -1))


class TimeEmbedding(nn.Module):
    """Timesteps [B] -> [B, 32]: sines and cosines, then two layers."""

    @nn.compact
    def __call__(self, timesteps: Array) -> Array:
        half = _EMBEDDING // 2
        frequencies = np.exp(-np.arange(half) * np.log(10000) / (half - 1)).astype(np.float32)
        angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None]
        x = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        x = jax.nn.mish(Linear(4 * _EMBEDDING, name="linear_0")(x))
        return Linear(_EMBEDDING, name="linear_1")(x)


class TemporalUNet(nn.Module):
    """Plans [B, H, A + X] at timesteps [B] -> the same shape (Diffuser, appendix C).

    H must be a multiple of 2^(levels - 1).
    """

    multipliers: Sequence[int] = (1, 2, 4, 8)  # of the width, a level each
    attention: bool = False
    width: int = 32

    @nn.compact
    def __call__(self, x: Array, timesteps: Array) -> Array:
        size = x.shape[-1]
        t = TimeEmbedding(name="time")(timesteps)
        widths = [self.width * m for m in self.multipliers]

        def level(x: Array, width: int, name: str) -> Array:
            x = ResidualBlock(width, name=f"{name}_block_0")(x, t)
            x = ResidualBlock(width, name=f"{name}_block_1")(x, t)
            return LinearAttention(name=f"{name}_attention")(x) if self.attention else x

        skips = []
        for i, width in enumerate(widths):
            x = level(x, width, f"down_{i}")
            skips.append(x)
            if i < len(widths) - 1:
                x = TimeConv(width, kernel=3, stride=2, name=f"down_{i}_conv")(x)
        x = ResidualBlock(widths[-1], name="middle_block_0")(x, t)
        if self.attention:
            x = LinearAttention(name="middle_attention")(x)
        x = ResidualBlock(widths[-1], name="middle_block_1")(x, t)
        for i, width in enumerate(reversed(widths[:-1])):
            x = level(jnp.concatenate([x, skips.pop()], axis=-1), width, f"up_{i}")
            x = Upsample(name=f"up_{i}_conv")(x)
        x = ConvBlock(self.width, name="output_block")(x)
        return Linear(size, name="outputs")(x)


class PlanValue(nn.Module):
    """Noised plans [B, H, A + X] at timesteps [B] -> their predicted returns [B]."""

    multipliers: Sequence[int] = (1, 2, 4, 8)
    width: int = 32

    @nn.compact
    def __call__(self, x: Array, timesteps: Array) -> Array:
        t = TimeEmbedding(name="time")(timesteps)
        last = self.width * self.multipliers[-1]
        for i, multiplier in enumerate(self.multipliers):
            width = self.width * multiplier
            x = ResidualBlock(width, name=f"level_{i}_block_0")(x, t)
            x = ResidualBlock(width, name=f"level_{i}_block_1")(x, t)
            x = TimeConv(width, kernel=3, stride=2, name=f"level_{i}_conv")(x)
        for i, width in enumerate((last // 2, last // 4)):
            x = ResidualBlock(width, name=f"middle_block_{i}")(x, t)
            x = TimeConv(width, kernel=3, stride=2, name=f"middle_conv_{i}")(x)
        x = jnp.swapaxes(x, 1, 2).reshape(x.shape[0], -1)  # channels first, as the authors flatten
        hidden = Linear(x.shape[-1] // 2, name="hidden")(jnp.concatenate([x, t], axis=-1))
        return Linear(1, name="outputs")(jax.nn.mish(hidden))[:, 0]
