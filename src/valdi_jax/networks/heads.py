"""Reward and value heads (paper, Table 2)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from valdi_jax.config import ModelConfig
from valdi_jax.networks.layers import MLP, ResidualMLP
from valdi_jax.types import Array


class RewardHead(nn.Module):
    """Latent [..., D] and action chunk [..., C * A] -> discounted reward of the chunk [...]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, z: Array, actions: Array) -> Array:
        x = jnp.concatenate([z, actions], axis=-1)
        net = ResidualMLP(self.config.reward_width, self.config.reward_depth, 1, name="net")
        return net(x)[..., 0]


class ValueHeads(nn.Module):
    """Latent [..., D] -> estimates of all value heads [E, ...]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, z: Array) -> Array:
        width = self.config.value_width
        heads = [MLP((width, width, 1), name=f"head_{i}") for i in range(self.config.value_heads)]
        return jnp.stack([head(z)[..., 0] for head in heads])
