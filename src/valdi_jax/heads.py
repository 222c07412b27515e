"""Reward head, twin value heads and the MLP dynamics (paper, Table 2)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from valdi_jax.config import ModelConfig
from valdi_jax.layers import MLP, ResidualMLP
from valdi_jax.regression import output_size
from valdi_jax.types import Array


class RewardHead(nn.Module):
    """Latent [..., D] and action chunk [..., C * A] -> outputs [..., O].

    `regression.decode` turns them into the discounted reward of the chunk.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, z: Array, actions: Array) -> Array:
        config = self.config
        x = jnp.concatenate([z, actions], axis=-1)
        return ResidualMLP(
            config.reward_width,
            config.reward_depth,
            output_size(config.head_kind),
            zero_outputs=config.head_kind == "two-hot",
            name="net",
        )(x)


class ValueHeads(nn.Module):
    """Latent [..., D] -> outputs of all value heads [E, ..., O], each decoded to an estimate."""

    config: ModelConfig

    @nn.compact
    def __call__(self, z: Array) -> Array:
        config = self.config
        widths = (config.value_width, config.value_width, output_size(config.head_kind))
        zero = config.head_kind == "two-hot"
        heads = [
            MLP(widths, zero_outputs=zero, name=f"head_{i}") for i in range(config.value_heads)
        ]
        return jnp.stack([head(z) for head in heads])


class MLPDynamics(nn.Module):
    """One deterministic step: latent [..., D] and action chunk [..., C * A] -> latent [..., D]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, z: Array, actions: Array) -> Array:
        x = jnp.concatenate([z, actions], axis=-1)
        net = ResidualMLP(self.config.mlp_width, self.config.mlp_depth, z.shape[-1], name="net")
        return z + net(x)
