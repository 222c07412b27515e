"""The observation encoder (paper, Supp. B, "Encoder")."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from valdi_jax.config import ModelConfig
from valdi_jax.networks.layers import MLP, Conv, Linear, gelu, layer_norm, on_last_axis
from valdi_jax.observation import Observation
from valdi_jax.types import Array

_IMAGENET_MEAN = np.array((0.485, 0.456, 0.406), np.float32)
_IMAGENET_STD = np.array((0.229, 0.224, 0.225), np.float32)
_LAST_MAP = 4  # largest side of the feature map that the last convolution covers

Sides = tuple[int, int]


def convolutions(height: int, width: int) -> list[tuple[Sides, int, int]]:
    """(kernel, stride, padding) of each convolution for images of this size.

    The first divides each side by three, the next halve it until at most 4 pixels remain, and the
    last covers the rest. 96 x 96 pixels give the paper's network (Table 2).
    """
    shapes = [((5, 5), 3, 2)]
    height, width = -(-height // 3), -(-width // 3)
    while max(height, width) > _LAST_MAP:
        shapes.append(((3, 3), 2, 1))
        height, width = -(-height // 2), -(-width // 2)
    return [*shapes, ((height, width), 1, 0)]


def layer_channels(config: ModelConfig, count: int) -> list[int]:
    """Output channels of ``count`` convolutions."""
    first, *halving, last = config.cnn_channels
    middle = [halving[min(i, len(halving) - 1)] for i in range(count - 2)]
    return [first, *middle, last]


def _standardize(image: Array) -> Array:
    """uint8 [..., channels] -> float32, standardised with ImageNet's mean and deviation."""
    mean, std = _IMAGENET_MEAN, _IMAGENET_STD
    if image.shape[-1] != 3:  # not RGB: average the channels' statistics
        mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
    x = image.astype(jnp.float32) / 255
    return (x - on_last_axis(mean, image)) / on_last_axis(std, image)


def image_features(image: Array, config: ModelConfig, *, normed: bool = False) -> Array:
    """Convolve images, uint8 [..., height, width, channels] -> [..., features].

    Called in a module, which then holds the convolutions. ``normed`` puts a LayerNorm over the
    channels before each GELU.
    """
    x = _standardize(image.reshape((-1, *image.shape[-3:])))
    shapes = convolutions(*x.shape[1:3])
    channels = layer_channels(config, len(shapes))
    for i, (features, shape) in enumerate(zip(channels, shapes, strict=True)):
        x = Conv(features, *shape, name=f"conv_{i}")(x)
        x = gelu(layer_norm(name=f"norm_{i}")(x) if normed else x)
    return x.reshape((*image.shape[:-3], -1))


class Encoder(nn.Module):
    """Observation ``[..., ]`` -> latent ``[..., D]``; both modalities share the leading axes."""

    config: ModelConfig

    @nn.compact
    def __call__(self, observation: Observation) -> Array:
        config = self.config
        embeddings = []
        if observation.image is not None:
            x = image_features(observation.image, config)
            embeddings.append(Linear(config.encoder_width, name="image_embedding")(x))
        if observation.vector is not None:
            widths = (config.encoder_width, config.encoder_width)
            embeddings.append(MLP(widths, name="vector_embedding")(observation.vector))
        x = layer_norm(name="head_norm")(jnp.concatenate(embeddings, axis=-1))
        return MLP((x.shape[-1], config.latent_dim), name="head")(x)
