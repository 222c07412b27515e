"""A decoder from latents to pixels, for pictures alone: neither training nor planning uses it.

It is trained after the agent, on latents of the frozen encoder (paper, Supp. G, "Decoder").
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax.networks.layers import Linear, apply, initialise, layer_norm, normal_init
from valdi_jax.networks.transformer import Block
from valdi_jax.types import Array, Params

CHANNELS = 3  # red, green, blue


class Decoder(nn.Module):
    """Vision transformer without biases: latent [..., D] -> image [..., height, width, 3].

    Red, green and blue are in [0, 1].
    Every patch begins as the same projection of the latent plus its own learned position.
    """

    image: tuple[int, int] = (96, 96)  # height and width in pixels
    patch: int = 4  # pixels along a side
    width: int = 256
    depth: int = 3
    heads: int = 8
    hidden: int = 512

    @nn.compact
    def __call__(self, z: Array) -> Array:
        if any(side < 1 or side % self.patch for side in self.image):
            raise ValueError(f"patches of {self.patch} pixels do not tile an image of {self.image}")
        rows, columns = (side // self.patch for side in self.image)
        count, lead = rows * columns, z.shape[:-1]
        positions = self.param("positions", normal_init(0.02), (count, self.width))
        x = Linear(self.width, use_bias=False, name="latent")(z)[..., None, :]
        tokens = (*lead, count, self.width)
        x = jnp.broadcast_to(x, tokens) + jnp.broadcast_to(positions, tokens)
        for i in range(self.depth):
            x = Block(self.heads, self.hidden, count, name=f"block_{i}")(x)
        x = layer_norm(use_bias=False, name="norm")(x)
        x = Linear(CHANNELS * self.patch**2, use_bias=False, name="pixels")(x)
        x = x.reshape(*lead, rows, columns, self.patch, self.patch, CHANNELS)
        return jax.nn.sigmoid(x.swapaxes(-4, -3).reshape(*lead, *self.image, CHANNELS))


def init_decoder(key: Array, latent_dim: int, *, decoder: Decoder) -> Params:
    """Parameters of a decoder of latents of size ``latent_dim``.

    Raises:
        ValueError: if its patches do not tile its image.
    """
    return initialise(decoder, key, np.zeros((1, latent_dim), np.float32))


def decode(params: Params, z: Array, *, decoder: Decoder) -> Array:
    """Images [..., height, width, 3], red, green and blue in [0, 1], of latents [..., D]."""
    return apply(decoder, params, z)
