"""The cross-entropy method, and the planner that ties it to the world model (paper, Supp. D)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec

from valdi_jax import model
from valdi_jax.config import Config, PlannerConfig
from valdi_jax.types import Array, Observation, Params, Plan

_WARM_LIMIT = 1.5  # of a mean that is carried on, before tanh: actions of +-0.9


@struct.dataclass
class CEMState:
    """The search between two iterations."""

    mean: Array  # [...] of the sampling distribution
    std: Array  # [...]
    best: Array  # [...] best candidate seen so far
    best_score: Array  # []


def cem(
    score_fn: Callable[[Array, Array], Array],
    mean: Array,
    std: Array,
    key: Array,
    *,
    candidates: int,
    elites: int,
    iterations: int,
    draw: Callable[[Array, tuple[int, ...]], Array] = jax.random.normal,
) -> CEMState:
    """Maximise a score with the cross-entropy method (Rubinstein & Kroese, 2004).

    Args:
        score_fn: (candidates [N, ...], key) -> scores [N], to be maximised.
        mean: [...] of the first sampling distribution.
        std: [...] of the first sampling distribution.
        key: PRNG key.
        candidates: N sampled in each iteration.
        elites: K kept, 2 .. N (the sample standard deviation needs two).
        iterations: refits.
        draw: (key, [N, ...]) -> standard normal noise, which may be correlated within a candidate.

    Returns: the final distribution, and the best candidate seen over all iterations.

    Raises:
        ValueError: if ``elites`` is not in 2 .. N.
    """
    if not 2 <= elites <= candidates:
        raise ValueError(f"elites is {elites}; it must be between 2 and candidates ({candidates})")

    def iterate(state: CEMState, key: Array) -> tuple[CEMState, None]:
        sample_key, score_key = jax.random.split(key)
        noise = draw(sample_key, (candidates, *mean.shape))
        samples = state.mean + state.std * noise
        scores = score_fn(samples, score_key)
        # A candidate whose score is not a number is never an elite while any other is left.
        scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
        elite_scores, indices = jax.lax.top_k(scores, elites)
        elite = samples[indices]
        improved = elite_scores[0] > state.best_score
        return CEMState(
            mean=elite.mean(axis=0),
            std=elite.std(axis=0, ddof=1) + 1e-6,
            best=jnp.where(improved, elite[0], state.best),
            best_score=jnp.where(improved, elite_scores[0], state.best_score),
        ), None

    state = CEMState(mean=mean, std=std, best=mean, best_score=jnp.float32(-jnp.inf))
    state, _ = jax.lax.scan(iterate, state, jax.random.split(key, iterations))
    return state


def predicted_return(
    params: Params, z: Array, actions: Array, noise: Array, *, config: Config, steps: int
) -> Array:
    """Discounted return [...] of action chunks [..., H, C * A] from a latent z (equation 10).

    Args:
        params: all networks.
        z: [D] or [..., D].
        actions: [..., H, C * A]; the networks compute in their dtype.
        noise: [..., H, D] start of the diffusion.
        config: the run's configuration.
        steps: DDIM steps.
    """
    z = jnp.broadcast_to(z, (*actions.shape[:-2], z.shape[-1])).astype(actions.dtype)
    imagined = model.imagine(
        params["dynamics"], z, actions, noise, config=config.model, steps=steps
    )
    return trajectory_return(params, z, imagined, actions, config=config)


def trajectory_return(
    params: Params, z: Array, imagined: Array, actions: Array, *, config: Config
) -> Array:
    """Score [...] of imagined latents [..., H, D] after z [..., D] (equation 10)."""
    imagined = imagined.astype(actions.dtype)
    states = jnp.concatenate([z[..., None, :], imagined[..., :-1, :]], axis=-2)
    rewards = model.reward(params, states, actions, config=config)
    discount = config.learn.discount**config.model.chunk
    discounts = discount ** jnp.arange(config.model.horizon + 1, dtype=jnp.float32)
    terminal = model.value(params, imagined[..., -1, :], config=config)
    return rewards @ discounts[:-1] + discounts[-1] * terminal


@functools.partial(jax.jit, static_argnames=("config",))
def plan(
    params: Params,
    obs: Observation,
    key: Array,
    *,
    config: Config,
    noise_std: float | Array = 0.0,
    carry: Array | None = None,
) -> Plan:
    """Plan from one observation in one compiled call; pure, so it can be vmapped.

    Within ``jax.set_mesh(mesh)`` the devices of the mesh share the candidates, if these can be
    split evenly; the parameters, the observation and the key are then needed on all of them.

    Args:
        params: parameters of all networks, as in ``AgentState.params``.
        obs: one observation, without a batch axis.
        key: PRNG key; the same key gives the same plan.
        config: the run's configuration (static: another one compiles again).
        noise_std: standard deviation of the exploration noise added before tanh.
        carry: [H * C / hold, A] mean that the search starts from: ``Plan.carry`` of the plan
            before, with ``planner.warm_start``. Zero if not given.

    Returns: the plan; execute its first C actions, then plan again.
    """
    settings: PlannerConfig = config.planner
    shape = config.search_shape
    draw = functools.partial(correlated_normal, correlation=settings.correlation)
    noise_shape = (config.model.horizon, config.model.latent_dim)
    search_key, shared_key, answer_key, explore_key = jax.random.split(key, 4)
    z = model.encode(params, obs, config=config)
    scoring = {name: params[name] for name in ("dynamics", "reward", "value")}
    scoring = jax.tree.map(lambda x: x.astype(settings.precision), scoring)

    def score(samples: Array, key: Array) -> Array:
        actions = hold(jnp.tanh(samples), settings.action_hold)
        actions = actions.reshape(samples.shape[0], config.model.horizon, -1)
        actions = actions.astype(settings.precision)
        if settings.shared_noise:
            noise = jax.random.normal(shared_key, noise_shape)
            noise = jnp.broadcast_to(noise, (samples.shape[0], *noise_shape))
        else:
            noise = jax.random.normal(key, (samples.shape[0], *noise_shape))
        return _over_devices(
            functools.partial(predicted_return, config=config, steps=settings.diffusion_steps)
        )(scoring, z, actions, noise)

    found = cem(
        score,
        jnp.zeros(shape) if carry is None else carry,
        jnp.ones(shape),
        search_key,
        candidates=settings.candidates,
        elites=settings.elites,
        iterations=settings.iterations,
        draw=draw,
    )
    if settings.answer == "best":
        chosen, chosen_score = found.best, found.best_score
    else:
        chosen = found.mean
        chosen_score = score(chosen[None], answer_key)[0]
    explored = chosen + noise_std * draw(explore_key, shape)
    return Plan(
        actions=hold(jnp.tanh(explored), settings.action_hold),
        predicted_return=chosen_score,
        mean=hold(found.mean, settings.action_hold),
        std=hold(found.std, settings.action_hold),
        carry=shift_mean(found.mean, config=config) if settings.warm_start else None,
    )


def hold(sequences: Array, steps: int) -> Array:
    """Each action of sequences [..., S, A] for so many steps: [..., S * steps, A]."""
    return jnp.repeat(sequences, steps, axis=-2)


def correlated_normal(key: Array, shape: tuple[int, ...], *, correlation: float) -> Array:
    """Standard normal noise [..., S, A], along S an AR(1) process.

    x_t = c x_{t-1} + sqrt(1 - c^2) e_t with the correlation c and independent normal e_t.
    """
    noise = jax.random.normal(key, shape)
    if correlation == 0:
        return noise
    lag = np.subtract.outer(np.arange(shape[-2]), np.arange(shape[-2]))
    mixing = np.where(lag >= 0, correlation ** np.maximum(lag, 0), 0)
    mixing[:, 1:] *= np.sqrt(1 - correlation**2)  # all but the first are innovations
    return jnp.einsum("st,...ta->...sa", jnp.asarray(mixing, jnp.float32), noise)


def shift_mean(mean: Array, *, config: Config) -> Array:
    """The mean [S, A] that the next search starts from, once a chunk has been executed.

    It is bounded so that samples around it still reach either sign: where tanh has saturated,
    nothing in the score pulls a mean back.
    """
    executed = config.model.chunk // config.planner.action_hold
    mean = jnp.concatenate([mean[executed:], jnp.zeros_like(mean[:executed])])
    return jnp.clip(mean, -_WARM_LIMIT, _WARM_LIMIT)


def _over_devices(score: Callable[..., Array]) -> Callable[..., Array]:
    """`predicted_return` with its candidates [N, ...] spread over the mesh in context, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return score

    def spread(params: Params, z: Array, actions: Array, noise: Array) -> Array:
        if actions.shape[0] % mesh.size == 0:
            actions = jax.lax.with_sharding_constraint(actions, PartitionSpec(mesh.axis_names))
        return score(params, z, actions, noise)

    # Whatever kind of axes the mesh has, the compiler lays out what follows from that.
    return jax.sharding.auto_axes(spread, out_sharding=PartitionSpec())
