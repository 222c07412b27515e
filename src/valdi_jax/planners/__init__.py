"""Planners, one file each, their registry, and `plan`, which applies one to the model."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from valdi_jax import model
from valdi_jax.config import Config
from valdi_jax.errors import UsageError
from valdi_jax.observation import Observation
from valdi_jax.planners import cem, diffuser, guided, icem, mbdpo, mppi
from valdi_jax.planners.base import Planner, Problem, correlated_normal, hold
from valdi_jax.planners.scoring import (
    TailDraws,
    compare,
    draw_tail,
    encode,
    over_devices,
    predicted_return,
)
from valdi_jax.registry import Registry
from valdi_jax.types import Array, Params, Plan

PLANNERS: Registry[Planner] = Registry(
    "--planner.kind",
    {
        "cem": cem.PLANNER,
        "icem": icem.PLANNER,
        "mppi": mppi.PLANNER,
        "mbdpo": mbdpo.PLANNER,
        "guided": guided.PLANNER,
        "diffuser": diffuser.PLANNER,
    },
)


def first_carry(config: Config) -> Any:
    """``Plan.carry`` for the first plan of an episode."""
    planner = PLANNERS[config.planner.kind]
    settings = config.planner if planner.plan is None else config
    return planner.init(config.search_shape, config=settings)


def plan(
    params: Params,
    obs: Observation,
    key: Array,
    *,
    config: Config,
    noise_std: float | Array = 0.0,
    carry: Any = None,
) -> Plan:
    """Plan from one observation in one compiled call; pure, so it can be vmapped.

    Within ``jax.set_mesh(mesh)`` the mesh's devices share the candidates of a search if these split
    evenly; the parameters, the observation and the key must then be on all of them.

    Args:
        params: parameters of all networks, as in ``AgentState.params``.
        obs: one observation, without a batch axis.
        key: PRNG key; the same key gives the same plan.
        config: the run's configuration (static: another model or planner recompiles).
        noise_std: standard deviation of the exploration noise, added before the planner's squash
            (CEM's is tanh).
        carry: ``Plan.carry`` of the episode's previous plan; by default `first_carry`.

    Returns: the plan; execute its first C actions, then plan again.

    Raises:
        UsageError: if the planner or the dynamics is unknown, or naming an argument that does not
            fit; it is checked once for each compilation.
    """
    return _plan(params, obs, key, noise_std, carry, config=config.graph)


@functools.partial(jax.jit, static_argnames=("config",))
def _plan(
    params: Params,
    obs: Observation,
    key: Array,
    noise_std: float | Array,
    carry: Any,
    *,
    config: Config,
) -> Plan:
    _check_arguments(params, obs, key, noise_std)
    settings = config.planner
    planner = PLANNERS[settings.kind]
    carry = first_carry(config) if carry is None else _fitting(carry, config)
    if planner.plan is not None:
        return planner.plan(params, obs, key, noise_std, carry, config=config)
    noise_shape = (config.model.horizon, config.model.latent_dim)
    search_key, shared_key, answer_key, explore_key = jax.random.split(key, 4)
    z = encode(params, obs, config=config)
    scoring = {
        name: jax.tree.map(lambda x: x.astype(settings.precision), tree)
        for name, tree in params.items()
        if name not in ("encoder", "normalizer", "statistics")
    }
    if "statistics" in params:
        scoring["statistics"] = params["statistics"]

    def scored(
        params: Params, z: Array, actions: Array, noise: Array, tail: TailDraws | None
    ) -> Array:
        steps = settings.diffusion_steps
        return predicted_return(params, z, actions, noise, config=config, steps=steps, tail=tail)

    def score(sequences: Array, key: Array) -> Array:
        count, futures = sequences.shape[0], settings.futures
        actions = hold(sequences, settings.action_hold)
        actions = actions.reshape(count, config.model.horizon, -1).astype(settings.precision)
        actions = jnp.repeat(actions, futures, axis=0)
        if settings.shared_noise:
            noise = jnp.tile(draw_futures(shared_key, 1, futures, noise_shape), (count, 1, 1))
        else:
            noise = draw_futures(key, count, futures, noise_shape)
        tail = draw_tail(jax.random.fold_in(key, 1), (count * futures,), config=config)
        scores = over_devices(scored)(scoring, z, actions, noise, tail)
        return scores.reshape(count, futures).mean(axis=1)

    def propose(key: Array) -> Array:
        chunks = propose_chunks(
            scoring, z, _policy_noise(key, config), config=config, precision=settings.precision
        )
        actions = chunks.reshape(settings.policy_candidates, *config.plan_shape)
        return actions[:, :: settings.action_hold].astype(jnp.float32)

    problem = Problem(
        config.search_shape,
        config.model.chunk // settings.action_hold,
        score,
        propose if settings.policy_candidates and "policy" in params else None,
    )
    found, carry = planner.search(problem, carry, search_key, config=settings)
    if found.sequence.shape != problem.shape:
        raise UsageError(
            f"--planner.kind {settings.kind} found a sequence of the shape {found.sequence.shape}, "
            f"not {problem.shape}"
        )
    found_score = found.score
    if found_score is None:
        found_score = score(planner.squash(found.sequence)[None], answer_key)[0]
    noise = correlated_normal(explore_key, problem.shape, correlation=settings.correlation)
    actions = hold(planner.squash(found.sequence + noise_std * noise), settings.action_hold)
    return Plan(
        actions=actions,
        predicted_return=found_score,
        mean=hold(found.mean, settings.action_hold),
        std=hold(found.std, settings.action_hold),
        carry=carry,
        metrics=compare(params, z, actions, jax.random.fold_in(explore_key, 1), config=config),
    )


def draw_futures(key: Array, count: int, futures: int, shape: tuple[int, ...]) -> Array:
    """Standard normal noise [count * futures, *shape], of each candidate's futures in turn.

    Every second future starts from the negative of the one before: most of what a draw does to a
    score is odd in it, and cancels (antithetic draws).
    """
    noise = jax.random.normal(key, (count, -(-futures // 2), *shape))
    pairs = jnp.stack([noise, -noise], axis=2).reshape(count, -1, *shape)
    return pairs[:, :futures].reshape(-1, *shape)


def _policy_noise(key: Array, config: Config) -> Array:
    """Standard normal noise [H, P, C * A] of the policy's rollouts."""
    size = config.model.chunk * config.model.action_dim
    return jax.random.normal(key, (config.model.horizon, config.planner.policy_candidates, size))


def propose_chunks(
    params: Params, z: Array, noise: Array, *, config: Config, precision: str = "float32"
) -> Array:
    """Rollouts [P, H, C * A] of the policy prior through the dynamics from a latent z [D].

    Args:
        params: all networks, with a policy.
        z: [D].
        noise: [H, P, C * A] standard normal.
        config: the run's configuration.
        precision: in which the networks compute.
    """
    z = jnp.broadcast_to(z, (noise.shape[1], z.shape[-1])).astype(precision)

    def step(z: Array, noise: Array) -> tuple[Array, Array]:
        chunk = model.policy(params, z, noise.astype(precision), config=config).action
        following = model.imagine_step(params["dynamics"], z, chunk, config=config.model)
        return following.astype(precision), chunk

    _, chunks = jax.lax.scan(step, z, noise)
    return jnp.swapaxes(chunks, 0, 1)


def _fitting(carry: Any, config: Config) -> Any:
    """Raises UsageError if a carry is not of this configuration's plans."""
    ours, given = (jax.tree.map(jnp.shape, each) for each in (first_carry(config), carry))
    if ours == given:
        return carry
    raise UsageError("carry is not that of a plan of this configuration: give Plan.carry")


def _check_arguments(params: Any, obs: Any, key: Any, noise_std: Any) -> None:
    if not isinstance(params, dict) or not {"encoder", "unet"} & params.keys():
        raise UsageError("params are not those of all networks: give AgentState.params")
    if not isinstance(obs, Observation):
        kind = type(obs).__name__ if isinstance(obs, dict) else "an array"
        raise UsageError(f"obs is {kind}: give Observation(image=..., vector=...)")
    for name, axes in (("image", 3), ("vector", 1)):
        value = getattr(obs, name)
        if value is None:
            continue
        if value.ndim == axes + 1:
            raise UsageError(
                f"obs.{name} has a batch axis ({value.shape}): jax.vmap plans for several"
            )
        if value.ndim != axes:
            raise UsageError(f"obs.{name} has the shape {value.shape}, not {axes} axes")
    if obs.image is not None and obs.image.dtype != jnp.uint8:
        raise UsageError(f"obs.image is {obs.image.dtype}: give uint8 from 0 to 255")
    old = key.dtype == jnp.uint32 and key.shape == (2,)
    if not old and (not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape):
        raise UsageError("key is not a PRNG key: give jax.random.key(seed)")
    if jnp.ndim(noise_std):
        raise UsageError(f"noise_std has the shape {jnp.shape(noise_std)}: give one number")
