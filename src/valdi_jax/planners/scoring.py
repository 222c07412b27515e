"""Predicted return of action sequences (paper, equation 10)."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from valdi_jax import model
from valdi_jax.config import Config
from valdi_jax.types import Array, Params


def predicted_return(
    params: Params, z: Array, actions: Array, noise: Array, *, config: Config, steps: int
) -> Array:
    """Discounted return [...] of action chunks [..., H, C * A] from a latent z (equation 10).

    Args:
        params: all networks.
        z: [D] or [..., D].
        actions: [..., H, C * A]; the networks compute in their dtype.
        noise: [..., H, D] start of the sampler.
        steps: of the sampler.
    """
    chex.assert_shape(noise, (*actions.shape[:-1], z.shape[-1]))
    z = jnp.broadcast_to(z, (*actions.shape[:-2], z.shape[-1])).astype(actions.dtype)
    imagined = model.imagine(
        params["dynamics"], z, actions, noise, config=config.model, steps=steps
    )
    return trajectory_return(params, z, imagined, actions, config=config)


def trajectory_return(
    params: Params, z: Array, imagined: Array, actions: Array, *, config: Config
) -> Array:
    """Discounted return [...] of imagined latents [..., H, D] after z [..., D] (equation 10)."""
    imagined = imagined.astype(actions.dtype)
    states = jnp.concatenate([z[..., None, :], imagined[..., :-1, :]], axis=-2)
    rewards = model.reward(params, states, actions, config=config)
    discount = config.learn.discount**config.model.chunk
    discounts = discount ** jnp.arange(config.model.horizon + 1, dtype=jnp.float32)
    terminal = model.value(params, imagined[..., -1, :], config=config)
    return rewards @ discounts[:-1] + discounts[-1] * terminal


def over_devices(score: Callable[..., Array]) -> Callable[..., Array]:
    """`predicted_return` with its candidates [N, ...] sharded over the mesh in context, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return score

    def spread(params: Params, z: Array, actions: Array, noise: Array) -> Array:
        if actions.shape[0] % mesh.size == 0:
            actions = jax.lax.with_sharding_constraint(actions, PartitionSpec(mesh.axis_names))
        return score(params, z, actions, noise)

    # For any kind of mesh axes, the compiler derives the remaining layout.
    return jax.sharding.auto_axes(spread, out_sharding=PartitionSpec())
