"""The agent's networks behind plain functions of one parameter dict."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from valdi_jax.config import Config
from valdi_jax.dynamics import imagine, init_dynamics
from valdi_jax.encoder import Encoder
from valdi_jax.heads import RewardHead, ValueHeads
from valdi_jax.normalizer import init_normalizer, normalize
from valdi_jax.types import Array, Observation, Params

__all__ = [
    "encode",
    "encode_targets",
    "imagine",
    "init_params",
    "parameter_count",
    "reward",
    "value",
    "values",
]

_ENCODER_TILE = 64  # observations encoded at once on a CPU


def init_params(key: Array, observation: Observation, *, config: Config) -> Params:
    """Parameters of all networks, initialised as the reference does.

    Args:
        key: PRNG key.
        observation: one example (or its ``jax.ShapeDtypeStruct``s), with any leading axes.
        config: the run's configuration.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), observation)
    return _init_params(key, shapes, config)


@functools.partial(jax.jit, static_argnums=(1, 2))  # or each layer's draws compile by themselves
def _init_params(key: Array, shapes: Observation, config: Config) -> Params:
    model = config.model
    encoder_key, dynamics_key, reward_key, value_key = jax.random.split(key, 4)
    observation = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    z = jnp.zeros((1, model.latent_dim))
    chunk = jnp.zeros((1, model.chunk * model.action_dim))
    params = {
        "encoder": Encoder(model).init(encoder_key, observation)["params"],
        "dynamics": init_dynamics(dynamics_key, config=model),
        "reward": RewardHead(model).init(reward_key, z, chunk)["params"],
        "value": ValueHeads(model).init(value_key, z)["params"],
    }
    if model.normalize and observation.vector is not None:
        params["normalizer"] = init_normalizer(observation.vector.shape[-1])
    return params


def parameter_count(params: Params) -> int:
    """Trainable parameters in all."""
    trainable = {name: tree for name, tree in params.items() if name != "normalizer"}
    return sum(x.size for x in jax.tree.leaves(trainable))


def encode(params: Params, observation: Observation, *, config: Config) -> Array:
    """Latent [..., D] of an observation [..., ]."""
    if "normalizer" in params:
        vector = normalize(params["normalizer"], observation.vector)
        observation = observation.replace(vector=vector)
    return Encoder(config.model).apply({"params": params["encoder"]}, observation)


def encode_targets(params: Params, observation: Observation, *, config: Config) -> Array:
    """Latents [B, steps, D] of observations [B, steps, ...], cut off from the gradient."""
    params = jax.lax.stop_gradient(params)
    lead = observation.lead
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), observation)

    def apply(observation: Observation) -> Array:
        return encode(params, observation, config=config)

    latents = jax.lax.platform_dependent(
        flat,
        # A tile's activations stay in the cache: 1.7 times as fast as all at once. Not for passes
        # with gradient: within a loop XLA's CPU convolution gradients are many times slower.
        cpu=lambda flat: jax.lax.map(apply, flat, batch_size=_ENCODER_TILE),
        default=apply,
    )
    return latents.reshape(*lead, -1)


def reward(params: Params, z: Array, actions: Array, *, config: Config) -> Array:
    """Predicted discounted reward [...] of an action chunk [..., C * A] at a latent [..., D]."""
    return RewardHead(config.model).apply({"params": params["reward"]}, z, actions)


def values(params: Params, z: Array, *, config: Config) -> Array:
    """Estimates [E, ...] of every value head at a latent [..., D]."""
    return ValueHeads(config.model).apply({"params": params["value"]}, z)


def value(params: Params, z: Array, *, config: Config) -> Array:
    """The value [...] of a latent [..., D]: the minimum over the heads."""
    return values(params, z, config=config).min(axis=0)
