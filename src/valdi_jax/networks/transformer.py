"""The transformer over latent trajectories (paper, Supp. B, "Dynamics")."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from valdi_jax.config import ModelConfig
from valdi_jax.networks.layers import Linear, gelu, layer_norm, normal_init
from valdi_jax.types import Array


class Block(nn.Module):
    """Pre-norm transformer block without biases: [..., tokens, width] -> [..., answers, width].

    It attends to all tokens; only the last ``answers`` of them are computed further.
    """

    heads: int
    hidden: int
    answers: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        tokens, width = x.shape[-2:]
        h = Linear(3 * width, use_bias=False, name="qkv")(
            layer_norm(use_bias=False, name="attention_norm")(x)
        )
        q, k, v = (
            part.reshape(-1, tokens, self.heads, width // self.heads)
            for part in jnp.split(h, 3, axis=-1)
        )
        x, q = x[..., -self.answers :, :], q[:, -self.answers :]
        h = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = x + Linear(width, use_bias=False, name="projection")(h)
        h = layer_norm(use_bias=False, name="mlp_norm")(x)
        h = Linear(self.hidden, use_bias=False, name="mlp_in")(h)
        return x + Linear(width, use_bias=False, name="mlp_out")(gelu(h))


class TrajectoryTransformer(nn.Module):
    """Velocity of a noised latent trajectory, given its initial latent and the actions.

    The condition token holds z_t. Each of the H others concatenates the time embedding, a learned
    position marker, its action chunk and its noised latent. Subclasses define the time embedding.
    """

    config: ModelConfig

    def embed_time(self, time: Array) -> Array:
        """Embedding [..., timestep_dim] of a time or timestep [...]; called within `__call__`."""
        raise NotImplementedError

    @nn.compact
    def __call__(self, z: Array, actions: Array, noised: Array, time: Array) -> Array:
        """Args: z [..., D]; actions [..., H, C * A]; noised [..., H, D]; time [...].

        Returns: velocity [..., H, D].
        """
        config = self.config
        horizon = noised.shape[-2]
        marker_init = normal_init(0.02)
        condition_size = config.transformer_width - z.shape[-1]
        target_size = (
            config.transformer_width - config.timestep_dim - actions.shape[-1] - noised.shape[-1]
        )
        if target_size < 1:
            raise ValueError(
                f"transformer_width {config.transformer_width} is too small: a token holds the "
                f"timestep ({config.timestep_dim}), an action chunk ({actions.shape[-1]}), a "
                f"latent ({noised.shape[-1]}) and at least one marker value"
            )
        condition_marker = self.param("condition_marker", marker_init, (condition_size,))
        target_markers = self.param("target_markers", marker_init, (horizon, target_size))
        embedding = self.embed_time(time)[..., None, :].astype(noised.dtype)

        lead = noised.shape[:-2]
        tile = (*lead, horizon)
        tokens = jnp.concatenate(
            [
                jnp.broadcast_to(embedding, (*tile, config.timestep_dim)),
                jnp.broadcast_to(target_markers, (*tile, target_size)),
                jnp.broadcast_to(actions, (*tile, actions.shape[-1])),
                noised,
            ],
            axis=-1,
        )
        condition = jnp.concatenate(
            [
                jnp.broadcast_to(z, (*lead, z.shape[-1])),
                jnp.broadcast_to(condition_marker, (*lead, condition_size)),
            ],
            axis=-1,
        )
        x = jnp.concatenate([condition[..., None, :], tokens], axis=-2)
        for i in range(config.transformer_depth):
            # The condition token has no output, so the last block drops it after the attention.
            answers = horizon if i == config.transformer_depth - 1 else horizon + 1
            x = Block(
                config.transformer_heads, config.transformer_hidden, answers, name=f"block_{i}"
            )(x)
        x = layer_norm(use_bias=False, name="norm")(x)
        return Linear(noised.shape[-1], use_bias=False, name="velocity")(x)


class DiffusionTransformer(TrajectoryTransformer):
    """The transformer with a learned embedding for each of its timesteps [...] int."""

    timesteps: int

    def embed_time(self, time: Array) -> Array:
        shape = (self.timesteps, self.config.timestep_dim)
        return self.param("timestep_embedding", normal_init(1.0), shape)[time]
