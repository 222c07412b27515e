"""The encoder: an observation becomes a latent (paper, Supp. B, "Encoder")."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from valdi_jax.config import ModelConfig
from valdi_jax.layers import MLP, Conv, Linear, gelu, layer_norm
from valdi_jax.types import Array, Observation

# (kernel, stride, padding) of the five convolutions; 96 x 96 pixels end as 1 x 1.
CONVOLUTIONS = ((5, 3, 2), (3, 2, 1), (3, 2, 1), (3, 2, 1), (4, 1, 0))
_IMAGENET_MEAN = np.array((0.485, 0.456, 0.406), np.float32)
_IMAGENET_STD = np.array((0.229, 0.224, 0.225), np.float32)


class Encoder(nn.Module):
    """Observation ``[..., ]`` -> latent ``[..., D]``; both modalities share the leading axes."""

    config: ModelConfig

    @nn.compact
    def __call__(self, observation: Observation) -> Array:
        config = self.config
        embeddings = []
        if observation.image is not None:
            lead = observation.image.shape[:-3]
            x = observation.image.reshape((-1, *observation.image.shape[-3:]))
            x = (x.astype(jnp.float32) / 255 - _IMAGENET_MEAN) / _IMAGENET_STD
            for i, (channels, shape) in enumerate(
                zip(config.cnn_channels, CONVOLUTIONS, strict=True)
            ):
                x = gelu(Conv(channels, *shape, name=f"conv_{i}")(x))
            x = x.reshape((*lead, -1))
            embeddings.append(Linear(config.encoder_width, name="image_embedding")(x))
        if observation.vector is not None:
            widths = (config.encoder_width, config.encoder_width)
            embeddings.append(MLP(widths, name="vector_embedding")(observation.vector))
        x = layer_norm(name="head_norm")(jnp.concatenate(embeddings, axis=-1))
        return MLP((x.shape[-1], config.latent_dim), name="head")(x)
