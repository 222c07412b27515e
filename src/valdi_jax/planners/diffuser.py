"""Diffuser: plans are samples, steered by a value (Janner et al., 2022)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from valdi_jax import model
from valdi_jax.config import Config, PlannerConfig
from valdi_jax.diffusion import Guide, cosine_posterior, guided_sample
from valdi_jax.networks.scaler import scale, unscale
from valdi_jax.observation import Observation
from valdi_jax.planners.base import Planner, clip, no_nan
from valdi_jax.types import Array, Params, Plan


def init(shape: tuple[int, int], *, config: PlannerConfig) -> tuple[()]:
    """No carry: every plan starts from noise."""
    return ()


def plan(
    params: Params,
    obs: Observation,
    key: Array,
    noise_std: float | Array,
    carry: Any,
    *,
    config: Config,
) -> Plan:
    """The best of N sampled plans by their value, or the first without a network plan_value."""
    assert obs.vector is not None
    sample_key, explore_key = jax.random.split(key)
    size, rows = config.model.action_dim, config.model.horizon + 1
    count, settings = config.planner.candidates, config.planner.diffuser
    kind, scalers = config.model.unet.scaler, params["scalers"]
    state = scale(scalers["states"], obs.vector, kind=kind)
    posterior = cosine_posterior(config.model.unet.timesteps)
    shape = (count, rows, size + config.model.state_dim)

    def denoise(plans: Array, timestep: Array) -> Array:
        clean = model.denoise_plans(params, plans, jnp.full(count, timestep), config=config)
        return jnp.clip(clean, -1, 1) if settings.clip else clean

    def value(plans: Array, timestep: Array) -> Array:
        return model.plan_value(params, plans, jnp.full(count, timestep), config=config)

    guide = None
    if "plan_value" in params:
        guide = Guide(value, settings.scale, settings.guide_steps, settings.guide_stop)
    noise = jax.random.normal(sample_key, (len(posterior.variance) + 1, *shape))
    pin = functools.partial(pin_first, state=state, actions=size)
    plans, values = guided_sample(denoise, noise, pin, posterior=posterior, guide=guide)
    best = jnp.argmax(no_nan(values))
    actions = unscale(scalers["actions"], plans[best, :, :size], kind=kind)
    actions = actions[: config.model.horizon]
    noised = actions + noise_std * jax.random.normal(explore_key, actions.shape)
    return Plan(
        actions=clip(noised),
        predicted_return=values[best],
        mean=actions,
        std=jnp.std(unscale(scalers["actions"], plans[:, :-1, :size], kind=kind), axis=0),
        carry=carry,
    )


def pin_first(plans: Array, *, state: Array, actions: int) -> Array:
    """Plans [N, H + 1, A + S] whose first state is the present one."""
    return plans.at[:, 0, actions:].set(state)


def _no_search(*_: Any, **__: Any) -> Any:
    raise TypeError("Diffuser samples plans: it does not search")


PLANNER = Planner(init, _no_search, clip, plan)
