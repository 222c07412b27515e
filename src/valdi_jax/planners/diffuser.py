"""Diffuser: plans are samples, steered by a value or pinned to a goal (Janner et al., 2022)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from valdi_jax import model
from valdi_jax.config import Config
from valdi_jax.diffusion import Guide, cosine_posterior, guided_sample
from valdi_jax.networks.scaler import scale, unscale
from valdi_jax.observation import Observation
from valdi_jax.planners.base import Planner, clip, no_nan
from valdi_jax.types import Array, Params, Plan


class Carry(NamedTuple):
    """What an episode keeps of its only plan."""

    step: Array  # [] int32, of the next action; 0 before there is a plan
    rows: Array  # [H + 1, A + S] in the environment's units
    value: Array  # []


def init(shape: tuple[int, int], *, config: Config) -> Carry | tuple[()]:
    """No carry where every step plans anew."""
    if config.planner.diffuser.controller == "actions":
        return ()
    rows = jnp.zeros((config.model.horizon + 1, config.model.action_dim + config.model.state_dim))
    return Carry(jnp.zeros((), jnp.int32), rows, jnp.zeros(()))


def plan(
    params: Params,
    obs: Observation,
    key: Array,
    noise_std: float | Array,
    carry: Any,
    *,
    config: Config,
) -> Plan:
    """The best of N sampled plans by their value, or the first without a network plan_value.

    With waypoints, the plan of an episode's first step stays, and a controller follows its states.
    """
    assert obs.vector is not None
    sample_key, explore_key = jax.random.split(key)
    size, state = config.model.action_dim, config.model.state_dim
    sample = functools.partial(_sample, config=config)
    if config.planner.diffuser.controller == "waypoints":
        rows, value = once(sample)(
            carry.step == 0, (carry.rows, carry.value), params, obs.vector, sample_key
        )
        steps = carry.step + jnp.arange(config.model.horizon)
        actions = waypoint_actions(rows[:, size:], obs.vector[:state], steps)
        carry = Carry(carry.step + 1, rows, value)
    else:
        rows, value = sample(params, obs.vector, sample_key)
        actions = rows[: config.model.horizon, :size]
    noised = actions + noise_std * jax.random.normal(explore_key, actions.shape)
    return Plan(
        actions=clip(noised),
        predicted_return=value,
        mean=actions,
        std=jnp.zeros_like(actions),
        carry=carry,
    )


def _sample(params: Params, vector: Array, key: Array, *, config: Config) -> tuple[Array, Array]:
    """A plan [H + 1, A + S] from an observation's vector, in its units, and its value."""
    size, states = config.model.action_dim, config.model.state_dim
    count, settings = config.planner.candidates, config.planner.diffuser
    kind, scalers = config.model.unet.scaler, params["scalers"]
    posterior = cosine_posterior(config.model.unet.timesteps)
    mask = model.known_of_plans(config)
    known = jnp.zeros(mask.shape)
    ends = vector[None, :states]
    if config.model.unet.goal:
        rest = jnp.zeros(states - config.model.unet.goal)
        ends = jnp.stack([ends[0], jnp.concatenate([vector[states:], rest])])
    ends = scale(scalers["states"], ends, kind=kind)
    known = known.at[0, size:].set(ends[0]).at[-1, size:].set(ends[-1])

    def denoise(plans: Array, timestep: Array) -> Array:
        clean = model.denoise_plans(params, plans, jnp.full(count, timestep), config=config)
        return jnp.clip(clean, -1, 1) if settings.clip else clean

    def value(plans: Array, timestep: Array) -> Array:
        return model.plan_value(params, plans, jnp.full(count, timestep), config=config)

    guide = None
    if "plan_value" in params:
        guide = Guide(value, settings.scale, settings.guide_steps, settings.guide_stop)
    noise = jax.random.normal(key, (len(posterior.variance) + 1, count, *mask.shape))
    plans, values = guided_sample(
        denoise, noise, lambda x: jnp.where(mask, known, x), posterior=posterior, guide=guide
    )
    best = jnp.argmax(no_nan(values))
    actions = unscale(scalers["actions"], plans[best, :, :size], kind=kind)
    states_then = unscale(scalers["states"], plans[best, :, size:], kind=kind)
    return jnp.concatenate([actions, states_then], axis=-1), values[best]


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


def waypoint_actions(planned: Array, state: Array, steps: Array) -> Array:
    """Actions [n, A] towards the planned states that follow steps [n].

    Args:
        planned: [H + 1, S], positions and then velocities.
        state: [S], the present one.
        steps: [n] int32 from the plan's start; beyond its end it holds the last position.
    """
    last = len(planned) - 1
    half = planned.shape[-1] // 2
    wanted = planned[jnp.minimum(steps + 1, last)]
    moving = (steps < last).astype(planned.dtype)[:, None]
    wanted = wanted.at[:, half:].multiply(moving)
    error = wanted - state[None]
    return error[:, :half] + error[:, half:]


def _no_search(*_: Any, **__: Any) -> Any:
    raise TypeError("Diffuser samples plans: it does not search")


PLANNER = Planner(init, _no_search, clip, plan)
