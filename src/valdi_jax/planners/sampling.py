"""What planners share that sample plans: the noise they start from, and the plan they keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from valdi_jax.diffusion import Posterior, add_noise
from valdi_jax.types import Array


class Carry(NamedTuple):
    """What an episode keeps of its last plan."""

    step: Array  # [] int32, of the next action; 0 before there is a plan
    rows: Array  # [H, ...]
    value: Array  # []


def no_plan(rows: int, size: int) -> Carry:
    """The carry before there is a plan [rows, size]."""
    return Carry(jnp.zeros((), jnp.int32), jnp.zeros((rows, size)), jnp.zeros(()))


def start(
    key: Array,
    shape: tuple[int, ...],
    *,
    posterior: Posterior,
    rows: Array | None = None,
    steps: int = 0,
) -> Array:
    """Noise for `diffusion.guided_sample` [K + 1, *shape], shape [N, H, D].

    All timesteps from pure noise, or the last ``steps`` of them from a plan [H, D], noised.
    """
    count = len(posterior.variance) if rows is None else steps
    noise = jax.random.normal(key, (count + 1, *shape))
    if rows is None:
        return noise
    rows = jnp.broadcast_to(rows, shape)
    return noise.at[0].set(add_noise(rows, noise[0], posterior.alpha_bars[count - 1]))


def follow(rows: Array, executed: int) -> Array:
    """Drop the executed rows of a plan [H, D] and repeat its last."""
    return jnp.concatenate([rows[executed:], jnp.repeat(rows[-1:], executed, axis=0)])


def once(compute: Callable[..., Any]) -> Callable[..., Any]:
    """(needed [], before, *arguments) -> ``compute(*arguments)`` if needed, else ``before``.

    Under vmap, nothing is computed unless at least one needs it; `jax.lax.cond` would always.
    """

    @jax.custom_batching.custom_vmap
    def either(needed: Array, before: Any, *arguments: Any) -> Any:
        return jax.lax.cond(needed, lambda: compute(*arguments), lambda: before)

    @either.def_vmap
    def batched(size: int, is_batched: Any, needed: Array, before: Any, *arguments: Any) -> Any:
        axes = [jax.tree.map(lambda one: 0 if one else None, each) for each in is_batched]
        spread = [
            jax.tree.map(
                lambda x, one: x if one else jnp.broadcast_to(x, (size, *jnp.shape(x))), each, flags
            )
            for each, flags in zip((needed, before), is_batched[:2], strict=True)
        ]

        def anew() -> Any:
            made = jax.vmap(compute, in_axes=tuple(axes[2:]), axis_size=size)(*arguments)
            return jax.tree.map(
                lambda new, old: jnp.where(spread[0].reshape(-1, *[1] * (new.ndim - 1)), new, old),
                made,
                spread[1],
            )

        made = jax.lax.cond(spread[0].any(), anew, lambda: spread[1])
        return made, jax.tree.map(lambda _: True, made)

    return either
