"""Diffuser: plans are samples, steered by a value or pinned to a goal (Janner et al., 2022)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from valdi_jax import model
from valdi_jax.config import Config
from valdi_jax.diffusion import Guide, cosine_posterior, guided_sample
from valdi_jax.errors import UsageError
from valdi_jax.networks.scaler import scale, unscale
from valdi_jax.observation import Observation
from valdi_jax.planners.base import Planner, clip, no_nan
from valdi_jax.planners.sampling import Carry, follow, no_plan, once, start
from valdi_jax.types import Array, Params, Plan


def init(shape: tuple[int, int], *, config: Config) -> Carry | tuple[()]:
    """No carry where every step plans anew, from noise."""
    settings = config.planner.diffuser
    if settings.controller == "actions" and not settings.warm_start:
        return ()
    return no_plan(config.model.horizon + 1, config.model.action_dim + config.model.state_dim)


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
    With a replan_distance, another plan is made where the position has left it.
    """
    size, state = config.model.action_dim, config.model.state_dim
    expected = (state + config.model.unet.goal,)
    if obs.vector is None or obs.vector.shape != expected:
        given = "no vector" if obs.vector is None else f"a vector {obs.vector.shape}"
        raise UsageError(f"obs does not fit the parameters: it has {given}, not one {expected}")
    sample_key, explore_key = jax.random.split(key)
    settings = config.planner.diffuser
    sample = functools.partial(_sample, rows=None, config=config)
    if settings.controller == "waypoints":
        needed = carry.step == 0
        if settings.replan_distance:
            off = deviation(carry.rows[:, size:], obs.vector[:state], carry.step)
            needed |= off > settings.replan_distance
        rows, value = once(sample)(
            needed, (carry.rows, carry.value), params, obs.vector, sample_key
        )
        step = jnp.where(needed, 0, carry.step)
        actions = waypoint_actions(
            rows[:, size:], obs.vector[:state], step + jnp.arange(config.model.horizon)
        )
        carry = Carry(step + 1, rows, value)
    elif settings.warm_start:
        warm = _sample(params, obs.vector, sample_key, rows=follow(carry.rows, 1), config=config)
        rows, value = once(sample)(carry.step == 0, warm, params, obs.vector, sample_key)
        actions = rows[: config.model.horizon, :size]
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


def _sample(
    params: Params, vector: Array, key: Array, *, rows: Array | None, config: Config
) -> tuple[Array, Array]:
    """A plan [H + 1, A + X] from an observation's vector, in its units, and its value.

    It starts from ``rows``, another plan in these units, if they are given.
    """
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
    if rows is not None:
        parts = {"actions": rows[:, :size], "states": rows[:, size:]}
        rows = jnp.concatenate([scale(scalers[k], x, kind=kind) for k, x in parts.items()], axis=-1)
    shape = (count, *mask.shape)
    noise = start(key, shape, posterior=posterior, rows=rows, steps=settings.warm_start)
    plans, values = guided_sample(
        denoise, noise, lambda x: jnp.where(mask, known, x), posterior=posterior, guide=guide
    )
    best = jnp.argmax(no_nan(values))
    actions = unscale(scalers["actions"], plans[best, :, :size], kind=kind)
    states_then = unscale(scalers["states"], plans[best, :, size:], kind=kind)
    return jnp.concatenate([actions, states_then], axis=-1), values[best]


def deviation(planned: Array, state: Array, step: Array) -> Array:
    """Distance [] between the position in a state [X] and the one planned for a step [].

    Args:
        planned: [H + 1, X], as `waypoint_actions` takes it.
        state: [X], the present one.
        step: [] int32 from the plan's start; beyond its end the last position counts.
    """
    half = planned.shape[-1] // 2
    there = planned[jnp.minimum(step, len(planned) - 1)]
    return jnp.linalg.norm(state[:half] - there[:half])


def waypoint_actions(planned: Array, state: Array, steps: Array) -> Array:
    """Actions [n, A] towards the planned states that follow steps [n].

    Args:
        planned: [H + 1, X], positions and then velocities.
        state: [X], the present one.
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


def _passes(config: Config) -> int:
    return config.model.unet.timesteps * (1 + config.planner.diffuser.guide_steps)


PLANNER = Planner(init, _no_search, clip, plan, _passes)
