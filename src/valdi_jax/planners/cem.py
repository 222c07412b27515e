"""The cross-entropy method (paper, Supp. D)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from flax import struct

from valdi_jax.config import PlannerConfig
from valdi_jax.planners.base import Found, Planner, Problem, correlated_normal, no_nan, shift
from valdi_jax.types import Array

_WARM_LIMIT = 1.5  # of a warm-start mean, before tanh: actions of +-0.9


class CEMState(struct.PyTreeNode):
    """State between two iterations."""

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
        candidates: N sampled per iteration.
        elites: K kept, 2 .. N (the sample standard deviation needs two).
        iterations: refits.
        draw: (key, [N, ...]) -> standard normal noise, possibly correlated within a candidate.

    Returns: the final distribution, and the best candidate of all iterations.

    Raises:
        ValueError: if ``elites`` is not in 2 .. N.
    """
    chex.assert_equal_shape([mean, std])
    if not 2 <= elites <= candidates:
        raise ValueError(f"elites is {elites}; it must be between 2 and candidates ({candidates})")

    def iterate(state: CEMState, key: Array) -> tuple[CEMState, None]:
        sample_key, score_key = jax.random.split(key)
        noise = draw(sample_key, (candidates, *mean.shape))
        samples = state.mean[None] + state.std[None] * noise
        scores = score_fn(samples, score_key)
        scores = no_nan(scores)
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


def init(shape: tuple[int, int], *, config: PlannerConfig) -> Array | None:
    """Initial mean [S, A] if searches are warm-started."""
    return jnp.zeros(shape) if config.warm_start else None


def search(
    problem: Problem, carry: Array | None, key: Array, *, config: PlannerConfig
) -> tuple[Found, Array | None]:
    """CEM over sequences before tanh, from mean 0 or ``carry`` and standard deviation 1."""
    found = cem(
        lambda samples, key: problem.score(jnp.tanh(samples), key),
        jnp.zeros(problem.shape) if carry is None else carry,
        jnp.ones(problem.shape),
        key,
        candidates=config.candidates,
        elites=config.elites,
        iterations=config.iterations,
        draw=functools.partial(correlated_normal, correlation=config.correlation),
    )
    if config.warm_start:
        # Bounded, so that samples around it reach both signs: where tanh saturates, the score does
        # not pull the mean back.
        carry = jnp.clip(shift(found.mean, problem.executed), -_WARM_LIMIT, _WARM_LIMIT)
    best = config.answer == "best"
    return Found(
        sequence=found.best if best else found.mean,
        score=found.best_score if best else None,
        mean=found.mean,
        std=found.std,
    ), carry


PLANNER = Planner(init, search, squash=jnp.tanh)
