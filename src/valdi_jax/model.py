"""The agent's networks as pure functions of one parameter dict."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax.config import Config, ModelConfig
from valdi_jax.dynamics import DYNAMICS
from valdi_jax.networks.encoder import Encoder
from valdi_jax.networks.heads import RewardHead, ValueHeads
from valdi_jax.networks.layers import apply, initialise
from valdi_jax.networks.normalizer import init_normalizer, normalize
from valdi_jax.networks.scaler import init_scaler
from valdi_jax.networks.tdmpc2 import (
    SimplexEncoder,
    energy_net,
    policy_net,
    q_net,
    reward_net,
)
from valdi_jax.networks.transformer import DiffusionTransformer
from valdi_jax.networks.twohot import decode
from valdi_jax.networks.unet import PlanValue, TemporalUNet
from valdi_jax.observation import Observation
from valdi_jax.registry import Registry
from valdi_jax.types import Array, Params

__all__ = [
    "NETWORKS",
    "Action",
    "denoise_plans",
    "denoise_prior",
    "encode",
    "encode_targets",
    "energy",
    "energy_bonus",
    "imagine",
    "imagine_step",
    "init_params",
    "known_of_plans",
    "known_of_prior",
    "parameter_count",
    "params_shapes",
    "plan_value",
    "policy",
    "q_outputs",
    "q_values",
    "reward",
    "reward_output",
    "value",
    "values",
]

_ENCODER_TILE = 64  # observations per encoder pass on a CPU

_STATISTICS = ("normalizer", "statistics", "scalers")  # parameters that no gradient trains
_MIN_LOG_STD, _MAX_LOG_STD = -10.0, 2.0  # of the policy prior
_LEAST_STD = 1e-6  # of the energy's logits


def _dummies(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """A latent [1, D] and an action chunk [1, C * A], for `initialise`."""
    sizes = config.latent_dim, config.chunk * config.action_dim
    z, chunk = (np.zeros((1, size), np.float32) for size in sizes)
    return z, chunk


def _init_policy(key: Array, *, config: Config) -> Params:
    return initialise(policy_net(config.model), key, _dummies(config.model)[0])


def _init_energy(key: Array, *, config: Config) -> Params:
    return initialise(energy_net(config.model), key, *_dummies(config.model))


def _init_q(key: Array, *, config: Config) -> Params:
    return initialise(q_net(config.model), key, *_dummies(config.model))


def _init_prior(key: Array, *, config: Config) -> Params:
    model, z = config.model, _dummies(config.model)[0]
    rows = np.zeros(
        (1, model.horizon, model.chunk * model.action_dim + model.latent_dim), np.float32
    )
    inputs = z, rows[..., :0], rows, np.zeros(1, np.int32)
    return initialise(_prior(model), key, *inputs)


def _dummy_plans(config: Config) -> tuple[np.ndarray, np.ndarray]:
    model = config.model
    rows = np.zeros((1, model.horizon + 1, model.action_dim + model.state_dim), np.float32)
    return rows, np.zeros(1, np.int32)


def _init_unet(key: Array, *, config: Config) -> Params:
    return initialise(_unet(config.model), key, *_dummy_plans(config))


def _init_plan_value(key: Array, *, config: Config) -> Params:
    return initialise(_plan_value(config.model), key, *_dummy_plans(config))


# Networks besides the agent's own: (key, *, config) -> parameters.
NETWORKS: Registry[Callable[..., Params]] = Registry(
    "--model.networks",
    {
        "policy": _init_policy,
        "energy": _init_energy,
        "q": _init_q,
        "prior": _init_prior,
        "unet": _init_unet,
        "plan_value": _init_plan_value,
    },
)


class Action(NamedTuple):
    """A sample of the policy prior."""

    action: Array  # [..., C * A] in (-1, 1)
    mean: Array  # [..., C * A] before tanh
    log_std: Array  # [..., C * A] before tanh
    entropy: Array  # [...] minus the log density of the sample
    scaled_entropy: Array  # [...] the same, as TD-MPC2 scales it


def init_params(key: Array, observation: Observation, *, config: Config) -> Params:
    """Initialise all networks as the reference does.

    ``observation`` is one example (or its ``jax.ShapeDtypeStruct``s), with any leading axes.

    Raises:
        UsageError: if a network or the dynamics in the configuration is unknown.
    """
    config = config.graph
    model = config.model
    if config.diffuses_plans:
        keys = jax.random.split(key, len(model.networks))
        params = {
            name: NETWORKS[name](network_key, config=config)
            for name, network_key in zip(model.networks, keys, strict=True)
        }
        sizes = {"states": model.state_dim, "actions": model.action_dim}
        params["scalers"] = {n: init_scaler(model.unet.scaler, k) for n, k in sizes.items()}
        return jax.tree.map(jnp.asarray, params)
    # Keys of additional networks come last, so that the others stay the same.
    encoder_key, dynamics_key, reward_key, value_key, *others = jax.random.split(
        key, 4 + len(model.networks)
    )
    z, chunk = _dummies(model)
    params = {
        "encoder": initialise(_encoder(model), encoder_key, observation),
        "dynamics": DYNAMICS[model.dynamics].init(dynamics_key, config=model),
        "reward": initialise(_reward_head(model), reward_key, z, chunk),
    }
    if "q" not in model.networks:
        params["value"] = initialise(_value_heads(model), value_key, z)
    for name, network_key in zip(model.networks, others, strict=True):
        params[name] = NETWORKS[name](network_key, config=config)
    if model.normalize and observation.vector is not None:
        params["normalizer"] = init_normalizer(observation.vector.shape[-1])
    statistics = {}
    if "policy" in params:
        statistics["q_range"] = jnp.ones(())
    if "energy" in params:
        statistics |= {"energy_mean": jnp.zeros(()), "energy_std": jnp.ones(())}
    if statistics:
        params["statistics"] = statistics
    return jax.tree.map(jnp.asarray, params)


def params_shapes(observation: Observation, *, config: Config) -> Params:
    """What `init_params` returns, as ``jax.ShapeDtypeStruct``s."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), observation)
    return jax.eval_shape(lambda key: _traced(key, shapes, config.graph), jax.random.key(0))


@functools.partial(jax.jit, static_argnums=(1, 2))  # which remembers what it has traced
def _traced(key: Array, shapes: Observation, config: Config) -> Params:
    return init_params(key, shapes, config=config)


def _unet(config: ModelConfig) -> TemporalUNet:
    unet = config.unet
    return TemporalUNet(unet.multipliers, unet.attention, unet.width)


def _plan_value(config: ModelConfig) -> PlanValue:
    return PlanValue(config.unet.multipliers, config.unet.width)


def _prior(config: ModelConfig) -> DiffusionTransformer:
    return DiffusionTransformer(config, config.prior.timesteps)


def _encoder(config: ModelConfig) -> nn.Module:
    return SimplexEncoder(config) if config.encoder == "simplex" else Encoder(config)


def _reward_head(config: ModelConfig) -> nn.Module:
    return reward_net(config) if config.bins else RewardHead(config)


def _value_heads(config: ModelConfig) -> nn.Module:
    return q_net(config) if config.bins else ValueHeads(config)


def parameter_count(params: Params) -> int:
    """Number of trainable parameters."""
    trainable = {name: tree for name, tree in params.items() if name not in _STATISTICS}
    return sum(x.size for x in jax.tree.leaves(trainable))


def encode(params: Params, observation: Observation, *, config: Config) -> Array:
    """Latent [..., D] of an observation [..., ]."""
    if observation.image is not None and observation.vector is not None:
        chex.assert_shape(observation.vector, (*observation.image.shape[:-3], None))
    if "normalizer" in params:
        vector = normalize(params["normalizer"], observation.vector)
        observation = observation._replace(vector=vector)
    return apply(_encoder(config.model), params["encoder"], observation)


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


def imagine_step(params: Params, z: Array, chunk: Array, *, config: ModelConfig) -> Array:
    """The next latent [..., D] after an action chunk [..., C * A].

    A model of whole trajectories starts its sampler from zeros, with the chunk repeated.
    """
    dynamics = DYNAMICS[config.dynamics]
    if dynamics.step is not None:
        return dynamics.step(params, z, chunk, config=config)
    actions = jnp.repeat(chunk[..., None, :], config.horizon, axis=-2)
    noise = jnp.zeros((*z.shape[:-1], config.horizon, config.latent_dim))
    return imagine(params, z, actions, noise, config=config, steps=1)[..., 0, :]


def reward_output(params: Params, z: Array, actions: Array, *, config: Config) -> Array:
    """What the reward head learns: scalars [...], or logits [..., bins]; arguments of `reward`."""
    model = config.model
    chex.assert_shape(z, (..., model.latent_dim))
    chex.assert_shape(actions, (*z.shape[:-1], model.chunk * model.action_dim))
    return apply(_reward_head(model), params["reward"], z, actions)


def reward(params: Params, z: Array, actions: Array, *, config: Config) -> Array:
    """Predicted discounted reward [...] of an action chunk [..., C * A] at a latent [..., D]."""
    output = reward_output(params, z, actions, config=config)
    return decode(output) if config.model.bins else output


def q_outputs(
    params: Params, z: Array, actions: Array, *, config: Config, dropout: Array | None = None
) -> Array:
    """What the critics learn: values [E, ...], or logits [E, ..., bins].

    Args:
        params: all networks, with q.
        z: [..., D].
        actions: [..., C * A].
        config: the run's configuration.
        dropout: PRNG key; without it, nothing is dropped.
    """
    net = q_net(config.model, dropout=dropout is not None)
    output = apply(net, params["q"], z, actions, dropout=dropout)
    return output if config.model.bins else output[..., 0]


def q_values(params: Params, z: Array, actions: Array, *, config: Config) -> Array:
    """Values [E, ...] of an action chunk [..., C * A] at a latent [..., D] by each critic."""
    output = q_outputs(params, z, actions, config=config)
    return decode(output) if config.model.bins else output


def draw_pair(key: Array, *, config: Config) -> Array:
    """Two different critics [2]."""
    return jax.random.permutation(key, config.model.value_heads)[:2]


def policy(params: Params, z: Array, noise: Array, *, config: Config) -> Action:
    """Sample the policy prior at latents [..., D] with standard normal noise [..., C * A]."""
    output = apply(policy_net(config.model), params["policy"], z)
    mean, spread = jnp.split(output, 2, axis=-1)
    half = (_MAX_LOG_STD - _MIN_LOG_STD) / 2
    log_std = _MIN_LOG_STD + half * (jnp.tanh(spread) + 1)
    action = jnp.tanh(mean + noise * jnp.exp(log_std))
    gaussian = jnp.sum(-0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi), axis=-1)
    squash = jnp.sum(jnp.log(jnp.maximum(1 - action**2, 0) + 1e-6), axis=-1)
    log_density = gaussian - squash
    scale = gaussian * noise.shape[-1] / (log_density + 1e-8)
    return Action(action, mean, log_std, -log_density, -log_density * scale)


def energy(params: Params, z: Array, actions: Array, *, config: Config) -> Array:
    """Logit [...] that a chunk [..., C * A] was replayed at a latent [..., D]."""
    return apply(energy_net(config.model), params["energy"], z, actions)[..., 0]


def energy_bonus(params: Params, z: Array, actions: Array, *, config: Config) -> Array:
    """The energy in running standard deviations from its running mean, clipped; as `energy`."""
    statistics = params["statistics"]
    mean, std = statistics["energy_mean"], statistics["energy_std"]
    logit = energy(params, z, actions, config=config)
    limit = config.learn.energy.clip
    return jnp.clip((logit - mean) / jnp.maximum(std, _LEAST_STD), -limit, limit)


def value_outputs(params: Params, z: Array, *, config: Config) -> Array:
    """What the value heads learn: scalars [E, ...], or logits [E, ..., bins]; as `values`."""
    chex.assert_shape(z, (..., config.model.latent_dim))
    return apply(_value_heads(config.model), params["value"], z)


def values(params: Params, z: Array, *, config: Config) -> Array:
    """Estimates [E, ...] of all value heads at a latent [..., D]."""
    output = value_outputs(params, z, config=config)
    return decode(output) if config.model.bins else output


def value(params: Params, z: Array, *, config: Config) -> Array:
    """The value [...] of a latent [..., D]: the minimum over the heads."""
    return values(params, z, config=config).min(axis=0)


def denoise_prior(
    params: Params, z: Array, plans: Array, timesteps: Array, *, config: Config
) -> Array:
    """The prior's estimate of clean plans [..., H, C * A + D] from noised ones at timesteps [...].

    Row h is the action chunk h and the latent that follows it; z [..., D] is where they start.
    """
    return apply(_prior(config.model), params["prior"], z, plans[..., :0], plans, timesteps)


def known_of_plans(config: Config) -> np.ndarray:
    """Mask [H + 1, A + X] of what is pinned in Diffuser's plans: the first state, and a goal's."""
    model = config.model
    mask = np.zeros((model.horizon + 1, model.action_dim + model.state_dim), bool)
    mask[0, model.action_dim :] = True
    if model.unet.goal:
        mask[-1, model.action_dim :] = True
    return mask


def known_of_prior(config: Config) -> np.ndarray:
    """Mask [H, C * A + D] of what is pinned in the prior's plans: with a goal, the last latent."""
    model = config.model
    actions = model.chunk * model.action_dim
    mask = np.zeros((model.horizon, actions + model.latent_dim), bool)
    mask[-1, actions:] = bool(model.prior.goal)
    return mask


def denoise_plans(params: Params, plans: Array, timesteps: Array, *, config: Config) -> Array:
    """Diffuser's estimate of the clean plans [B, H + 1, A + X] from noised ones at timesteps [B].

    Plans are normalised; a row is an action and the state in which it is taken.
    """
    return apply(_unet(config.model), params["unet"], plans, timesteps)


def plan_value(params: Params, plans: Array, timesteps: Array, *, config: Config) -> Array:
    """Diffuser's predicted return [B] of noised plans [B, H + 1, A + X] at timesteps [B]."""
    return apply(_plan_value(config.model), params["plan_value"], plans, timesteps)
