"""The agent's networks as pure functions of one parameter dict."""

from __future__ import annotations

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from valdi_jax.config import Config, ModelConfig
from valdi_jax.dynamics import DYNAMICS
from valdi_jax.networks.encoder import Encoder
from valdi_jax.networks.heads import RewardHead, ValueHeads
from valdi_jax.networks.layers import apply
from valdi_jax.networks.normalizer import init_normalizer, normalize
from valdi_jax.observation import Observation
from valdi_jax.registry import Registry
from valdi_jax.types import Array, Params

__all__ = [
    "NETWORKS",
    "encode",
    "encode_targets",
    "imagine",
    "init_params",
    "parameter_count",
    "reward",
    "value",
    "values",
]

_ENCODER_TILE = 64  # observations per encoder pass on a CPU

# Networks besides the agent's own: (key, *, config) -> parameters.
NETWORKS: Registry[Callable[..., Params]] = Registry("--model.networks", {})


def init_params(key: Array, observation: Observation, *, config: Config) -> Params:
    """Initialise all networks as the reference does.

    ``observation`` is one example (or its ``jax.ShapeDtypeStruct``s), with any leading axes.

    Raises:
        UsageError: if a network or the dynamics in the configuration is unknown.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), observation)
    return _init_params(key, shapes, config.graph)


@functools.partial(jax.jit, static_argnums=(1, 2))  # else each initialiser compiles separately
def _init_params(key: Array, shapes: Observation, config: Config) -> Params:
    model = config.model
    # Keys of additional networks come last, so that the others stay the same.
    encoder_key, dynamics_key, reward_key, value_key, *others = jax.random.split(
        key, 4 + len(model.networks)
    )
    observation = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    z = jnp.zeros((1, model.latent_dim))
    chunk = jnp.zeros((1, model.chunk * model.action_dim))
    params = {
        "encoder": Encoder(model).init(encoder_key, observation)["params"],
        "dynamics": DYNAMICS[model.dynamics].init(dynamics_key, config=model),
        "reward": RewardHead(model).init(reward_key, z, chunk)["params"],
        "value": ValueHeads(model).init(value_key, z)["params"],
    }
    for name, network_key in zip(model.networks, others, strict=True):
        params[name] = NETWORKS[name](network_key, config=config)
    if model.normalize and observation.vector is not None:
        params["normalizer"] = init_normalizer(observation.vector.shape[-1])
    return params


def parameter_count(params: Params) -> int:
    """Number of trainable parameters."""
    trainable = {name: tree for name, tree in params.items() if name != "normalizer"}
    return sum(x.size for x in jax.tree.leaves(trainable))


def encode(params: Params, observation: Observation, *, config: Config) -> Array:
    """Latent [..., D] of an observation [..., ]."""
    if observation.image is not None and observation.vector is not None:
        chex.assert_shape(observation.vector, (*observation.image.shape[:-3], None))
    if "normalizer" in params:
        vector = normalize(params["normalizer"], observation.vector)
        observation = observation._replace(vector=vector)
    return apply(Encoder(config.model), params["encoder"], observation)


def encode_targets(params: Params, observation: Observation, *, config: Config) -> Array:
    """Latents [B, steps, D] of observations [B, steps, ...], without gradient."""
    params = jax.lax.stop_gradient(params)
    lead = observation.lead
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), observation)

    def encode_all(observation: Observation) -> Array:
        return encode(params, observation, config=config)

    latents = jax.lax.platform_dependent(
        flat,
        # Tiles keep the activations in the CPU cache: 1.7 times as fast as one pass. Not for passes
        # with gradient: in a loop, XLA's CPU convolution gradients are many times slower.
        cpu=lambda flat: jax.lax.map(encode_all, flat, batch_size=_ENCODER_TILE),
        default=encode_all,
    )
    return latents.reshape(*lead, -1)


def imagine(
    params: Params, z: Array, actions: Array, noise: Array, *, config: ModelConfig, steps: int
) -> Array:
    """Imagined latents [..., H, D] that follow z under a sequence of action chunks.

    Args:
        params: parameters of the dynamics.
        z: [..., D] initial latent.
        actions: [..., H, C * A] action chunks.
        noise: [..., H, D] standard normal, the start of a generative model's sampler.
        steps: of the sampler; ignored by deterministic models.
    """
    lead = z.shape[:-1]
    chex.assert_shape(z, (*lead, config.latent_dim))
    chex.assert_shape(actions, (*lead, config.horizon, config.chunk * config.action_dim))
    return DYNAMICS[config.dynamics].imagine(params, z, actions, noise, config=config, steps=steps)


def reward(params: Params, z: Array, actions: Array, *, config: Config) -> Array:
    """Predicted discounted reward [...] of an action chunk [..., C * A] at a latent [..., D]."""
    model = config.model
    chex.assert_shape(z, (..., model.latent_dim))
    chex.assert_shape(actions, (*z.shape[:-1], model.chunk * model.action_dim))
    return apply(RewardHead(model), params["reward"], z, actions)


def values(params: Params, z: Array, *, config: Config) -> Array:
    """Estimates [E, ...] of all value heads at a latent [..., D]."""
    chex.assert_shape(z, (..., config.model.latent_dim))
    return apply(ValueHeads(config.model), params["value"], z)


def value(params: Params, z: Array, *, config: Config) -> Array:
    """The value [...] of a latent [..., D]: the minimum over the heads."""
    return values(params, z, config=config).min(axis=0)
