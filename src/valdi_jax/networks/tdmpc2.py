"""The networks of TD-MPC2 (Hansen et al., 2024) and the energy of MBDPO (2605.26282)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from valdi_jax.config import ModelConfig
from valdi_jax.networks.encoder import image_features
from valdi_jax.networks.layers import layer_norm, normal_init
from valdi_jax.observation import Observation
from valdi_jax.types import Array

_GROUP = 8  # channels of a simplex
_kernel_init = normal_init(0.02)


def simnorm(x: Array) -> Array:
    """Softmax over groups of 8 channels [..., D], so that a latent lies on simplices."""
    return jax.nn.softmax(x.reshape(*x.shape[:-1], -1, _GROUP), axis=-1).reshape(x.shape)


class NormedLinear(nn.Module):
    """Linear, dropout, LayerNorm, Mish: [..., in] -> [..., features]; SimNorm instead of Mish."""

    features: int
    dropout: float = 0.0
    simplex: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Dense(self.features, kernel_init=_kernel_init, name="dense")(x)
        if self.dropout:
            x = nn.Dropout(self.dropout, deterministic=False)(x)
        x = layer_norm(name="norm")(x)
        return simnorm(x) if self.simplex else jax.nn.mish(x)


class NormedMLP(nn.Module):
    """Two blocks and a linear: [..., in] -> [..., features], or on simplices."""

    width: int
    features: int
    simplex: bool = False
    zero: bool = False  # whether it starts at 0
    dropout: float = 0.0  # in the first block

    @nn.compact
    def __call__(self, *inputs: Array) -> Array:
        x = jnp.concatenate(inputs, axis=-1)
        x = NormedLinear(self.width, self.dropout, name="block_0")(x)
        x = NormedLinear(self.width, name="block_1")(x)
        if self.simplex:
            return NormedLinear(self.features, simplex=True, name="outputs")(x)
        init = nn.initializers.zeros if self.zero else _kernel_init
        return nn.Dense(self.features, kernel_init=init, name="outputs")(x)


class SimplexEncoder(nn.Module):
    """Observation ``[..., ]`` -> latent ``[..., D]`` on simplices.

    TD-MPC2's for vectors; images pass the convolutions of the paper's encoder, with LayerNorm.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, observation: Observation) -> Array:
        width = self.config.encoder_width
        embeddings = []
        if observation.image is not None:
            # Without norms, each convolution shrinks what differs between images. SIGReg undoes
            # that, and SimNorm does not: the latents stay equal, and no reward can be told.
            x = image_features(observation.image, self.config, normed=True)
            embeddings.append(NormedLinear(width, name="image_embedding")(x))
        if observation.vector is not None:
            x = observation.vector.astype(jnp.float32)
            for i in range(max(self.config.encoder_depth - 1, 1)):
                x = NormedLinear(width, name=f"block_{i}")(x)
            embeddings.append(x)
        x = jnp.concatenate(embeddings, axis=-1)
        return NormedLinear(self.config.latent_dim, simplex=True, name="outputs")(x)


def reward_net(config: ModelConfig) -> nn.Module:
    """(z, chunk) -> logits [..., bins] of the chunk's discounted reward."""
    return NormedMLP(config.reward_width, config.bins, zero=True)


def q_net(config: ModelConfig, *, dropout: bool = False) -> nn.Module:
    """(z, chunk), or z alone -> logits [E, ..., bins] of all critics; without bins [E, ..., 1]."""
    ensemble = nn.vmap(
        NormedMLP,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=None,
        axis_size=config.value_heads,
    )
    rate = config.dropout if dropout else 0.0
    return ensemble(config.value_width, config.bins or 1, zero=True, dropout=rate)


def policy_net(config: ModelConfig) -> nn.Module:
    """Z -> mean and spread [..., 2 C A] of the policy prior, before tanh."""
    return NormedMLP(config.policy_width, 2 * config.chunk * config.action_dim)


def energy_net(config: ModelConfig) -> nn.Module:
    """(z, chunk) -> logit [..., 1]: whether the chunk is a replayed one."""
    return NormedMLP(config.policy_width, 1, zero=True)
