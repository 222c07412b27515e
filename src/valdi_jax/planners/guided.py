"""Guided sampling on latents: Diffuser's sampler with a prior learned beside the world model.

A plan is H rows, each an action chunk and the latent that follows it. The prior denoises them from
the present latent; the gradient of their predicted return steers it; the world model scores the
samples, and the best one is the answer.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from valdi_jax import model
from valdi_jax.config import Config
from valdi_jax.diffusion import Guide, cosine_posterior, guided_sample
from valdi_jax.observation import Observation
from valdi_jax.planners.base import Planner, clip, correlated_normal, hold, no_nan
from valdi_jax.planners.sampling import Carry, follow, no_plan, once, start
from valdi_jax.planners.scoring import (
    compare,
    draw_tail,
    encode,
    predicted_return,
    trajectory_return,
)
from valdi_jax.types import Array, Params, Plan


def init(shape: tuple[int, int], *, config: Config) -> Carry | tuple[()]:
    """No carry where every plan starts from noise."""
    if not config.planner.diffuser.warm_start:
        return ()
    return no_plan(*model.known_of_prior(config).shape)


def plan(
    params: Params,
    obs: Observation,
    key: Array,
    noise_std: float | Array,
    carry: Any,
    *,
    config: Config,
) -> Plan:
    """The best of N sampled plans by `predicted_return`."""
    settings = config.planner
    sample_key, score_key, tail_key, explore_key, compare_key = jax.random.split(key, 5)
    z = encode(params, obs, config=config)
    goal = goal_latent(params, obs, config=config)
    fresh = functools.partial(sample_plans, rows=None, config=config)
    if settings.diffuser.warm_start:
        rows = follow(carry.rows, 1)
        warm = sample_plans(params, z, goal, sample_key, rows=rows, config=config)
        plans = once(fresh)(carry.step == 0, warm, params, z, goal, sample_key)
    else:
        plans = fresh(params, z, goal, sample_key)
    chunks = clip(plans[..., : config.model.chunk * config.model.action_dim])
    shape = (1 if settings.shared_noise else settings.candidates), *plans.shape[1:-1], z.shape[-1]
    noise = jnp.broadcast_to(jax.random.normal(score_key, shape), (settings.candidates, *shape[1:]))
    tail = draw_tail(tail_key, (settings.candidates,), config=config)
    steps = settings.diffusion_steps
    returns = predicted_return(params, z, chunks, noise, config=config, steps=steps, tail=tail)
    best = jnp.argmax(no_nan(returns))
    actions = chunks.reshape(-1, *config.plan_shape)
    explore = correlated_normal(explore_key, config.search_shape, correlation=settings.correlation)
    taken = clip(actions[best] + noise_std * hold(explore, settings.action_hold))
    if settings.diffuser.warm_start:
        carry = Carry(carry.step + 1, plans[best], returns[best])
    return Plan(
        actions=taken,
        predicted_return=returns[best],
        mean=actions[best],
        std=actions.std(axis=0),
        carry=carry,
        metrics=compare(params, z, taken, compare_key, config=config),
    )


def goal_latent(params: Params, obs: Observation, *, config: Config) -> Array:
    """Latent [D] at the goal that an observation holds; zeros without one."""
    size = config.model.prior.goal
    if not size:
        return jnp.zeros(config.model.latent_dim)
    assert obs.vector is not None  # a run is refused without one
    goal = obs.vector[-size:]
    there = jnp.zeros_like(obs.vector).at[:size].set(goal).at[-size:].set(goal)
    return model.encode(params, obs._replace(vector=there), config=config)


def sample_plans(
    params: Params, z: Array, goal: Array, key: Array, *, rows: Array | None, config: Config
) -> Array:
    """Plans [N, H, C * A + D] from a latent z [D], each action and latent as the prior knows them.

    Args:
        params: all networks, with a prior.
        z: [D].
        goal: [D], the last latent if there is a goal.
        key: PRNG key.
        rows: a plan [H, C * A + D] to start from; without it, they start from noise.
        config: the run's configuration.
    """
    count, settings = config.planner.candidates, config.planner.diffuser
    size = config.model.chunk * config.model.action_dim
    posterior = cosine_posterior(config.model.prior.timesteps)
    mask = model.known_of_prior(config)
    pinned = jnp.zeros(mask.shape).at[-1, size:].set(goal)
    zs = jnp.broadcast_to(z, (count, *z.shape))
    score_key, sample_key = jax.random.split(key)
    tail = draw_tail(score_key, (count,), config=config)

    def denoise(plans: Array, timestep: Array) -> Array:
        timesteps = jnp.full(count, timestep)
        clean = model.denoise_prior(params, zs, plans, timesteps, config=config)
        return clean.at[..., :size].set(clip(clean[..., :size]))

    def value(plans: Array, timestep: Array) -> Array:
        clean = denoise(plans, timestep)
        if not settings.through:
            clean = plans + jax.lax.stop_gradient(clean - plans)
        return trajectory_return(
            params, zs, clean[..., size:], clean[..., :size], config=config, tail=tail
        )

    guide = None
    if settings.scale and settings.guide_steps:
        guide = Guide(value, settings.scale, settings.guide_steps, settings.guide_stop)
    shape = (count, *mask.shape)
    noise = start(sample_key, shape, posterior=posterior, rows=rows, steps=settings.warm_start)
    plans, _ = guided_sample(
        denoise, noise, lambda x: jnp.where(mask, pinned, x), posterior=posterior, guide=guide
    )
    return plans


def _no_search(*_: Any, **__: Any) -> Any:
    raise TypeError("the guided planner samples plans: it does not search")


def _passes(config: Config) -> int:
    return config.model.prior.timesteps * (1 + config.planner.diffuser.guide_steps)


PLANNER = Planner(init, _no_search, clip, plan, _passes)
