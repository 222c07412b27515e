"""Predicted return of action sequences (paper, equation 10)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax.errors import FlaxError
from jax.sharding import PartitionSpec

from valdi_jax import model
from valdi_jax.config import Config
from valdi_jax.errors import UsageError
from valdi_jax.observation import Observation
from valdi_jax.types import Array, Params


def encode(params: Params, obs: Observation, *, config: Config) -> Array:
    """Latent [D] of the observation to plan from.

    Raises:
        UsageError: if it does not fit the parameters.
    """
    try:
        return model.encode(params, obs, config=config)
    except (TypeError, ValueError, FlaxError) as error:
        raise UsageError(f"obs does not fit the parameters: {error}") from error


class TailDraws(NamedTuple):
    """Random draws of the value of an imagined trajectory's end, where critics are its value."""

    noise: Array  # [..., C * A] of the policy's sample
    pair: Array  # [2] int, the critics that are averaged


def draw_tail(key: Array, lead: tuple[int, ...], *, config: Config) -> TailDraws | None:
    """Draws for trajectories [*lead]; ``None`` where a value head needs none."""
    if "q" not in config.model.networks:
        return None
    noise_key, pair_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (*lead, config.model.chunk * config.model.action_dim))
    return TailDraws(noise, model.draw_pair(pair_key, config=config))


def predicted_return(
    params: Params,
    z: Array,
    actions: Array,
    noise: Array,
    *,
    config: Config,
    steps: int,
    tail: TailDraws | None = None,
) -> Array:
    """Discounted return [...] of action chunks [..., H, C * A] from a latent z (equation 10).

    Args:
        params: all networks.
        z: [D] or [..., D].
        actions: [..., H, C * A]; the networks compute in their dtype.
        noise: [..., H, D] start of the sampler.
        config: the run's configuration.
        steps: of the sampler.
        tail: draws for the value of the end, if critics are its value.
    """
    chex.assert_shape(noise, (*actions.shape[:-1], z.shape[-1]))
    z = jnp.broadcast_to(z, (*actions.shape[:-2], z.shape[-1])).astype(actions.dtype)
    imagined = model.imagine(
        params["dynamics"], z, actions, noise, config=config.model, steps=steps
    )
    return trajectory_return(params, z, imagined, actions, config=config, tail=tail)


def trajectory_return(
    params: Params,
    z: Array,
    imagined: Array,
    actions: Array,
    *,
    config: Config,
    tail: TailDraws | None = None,
) -> Array:
    """Discounted return [...] of imagined latents [..., H, D] after z [..., D] (equation 10).

    An energy, if there is one, adds eta times its normalised logit to each reward (MBDPO).
    """
    imagined = imagined.astype(actions.dtype)
    states = jnp.concatenate([z[..., None, :], imagined[..., :-1, :]], axis=-2)
    rewards = model.reward(params, states, actions, config=config)
    if "energy" in params and config.planner.eta:
        bonus = model.energy_bonus(params, states, actions, config=config)
        rewards = rewards + config.planner.eta * bonus
    discount = config.learn.discount**config.model.chunk
    discounts = discount ** jnp.arange(config.model.horizon + 1, dtype=jnp.float32)
    terminal = end_value(params, imagined[..., -1, :], tail, config=config)
    return rewards @ discounts[:-1] + discounts[-1] * terminal


def end_value(params: Params, z: Array, tail: TailDraws | None, *, config: Config) -> Array:
    """The value [...] of latents [..., D]: the value head's, or two critics' of a policy sample."""
    if tail is None:
        return model.value(params, z, config=config)
    action = model.policy(params, z, tail.noise.astype(z.dtype), config=config).action
    return model.q_values(params, z, action, config=config)[tail.pair].mean(axis=0)


def over_devices(score: Callable[..., Array]) -> Callable[..., Array]:
    """`predicted_return` with its candidates [N, ...] sharded over the mesh in context, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return score

    def spread(params: Params, z: Array, actions: Array, *draws: Any) -> Array:
        if actions.shape[0] % mesh.size == 0:
            actions = jax.lax.with_sharding_constraint(actions, PartitionSpec(mesh.axis_names))
        return score(params, z, actions, *draws)

    # For any kind of mesh axes, the compiler derives the remaining layout.
    return jax.sharding.auto_axes(spread, out_sharding=PartitionSpec())


def compare(
    params: Params, z: Array, actions: Array, key: Array, *, config: Config
) -> dict[str, Array]:
    """How a plan's first chunk stands to a policy prior and an energy, if there are any.

    Its distance from the prior's mean, its logit, and its temporal-difference error, the next
    latent and the reward imagined (MBDPO's figures 21 and 22).
    """
    if not {"policy", "energy"} & params.keys():
        return {}
    chunk = actions[: config.model.chunk].reshape(-1)
    metrics = {}
    if "policy" in params:
        prior = model.policy(params, z, jnp.zeros_like(chunk), config=config).mean
        metrics["plan/drift"] = jnp.abs(chunk - jnp.tanh(prior)).mean()
    if "energy" in params:
        metrics["plan/energy"] = model.energy(params, z, chunk, config=config)
    following = model.imagine_step(params["dynamics"], z, chunk, config=config.model)
    tail = draw_tail(key, (), config=config)
    later = config.learn.discount**config.model.chunk * end_value(
        params, following, tail, config=config
    )
    target = model.reward(params, z, chunk, config=config) + later
    if tail is None:
        value = model.value(params, z, config=config)
    else:
        value = model.q_values(params, z, chunk, config=config)[tail.pair].mean(axis=0)
    return metrics | {"plan/td_error": jnp.abs(target - value)}
