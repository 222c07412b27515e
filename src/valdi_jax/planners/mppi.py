"""MPPI as in TD-MPC2 (Williams et al., 2015; Hansen et al., 2024).

The policy prior, if there is one, proposes some of the candidates. Each refit weights the elites by
a softmax of their returns and bounds the standard deviation. The next decision starts from the
shifted mean. It searches in action space, with clipping.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from valdi_jax.config import PlannerConfig
from valdi_jax.planners.base import (
    Found,
    Planner,
    Problem,
    clip,
    no_nan,
    shift,
    with_proposals,
)
from valdi_jax.types import Array


class MPPIState(NamedTuple):
    """State between two iterations."""

    mean: Array  # [S, A]
    std: Array  # [S, A]
    best: Array  # [S, A] best candidate seen so far
    best_score: Array  # []
    drawn: Array  # [S, A] an elite of the last iteration, by its weight


def init(shape: tuple[int, int], *, config: PlannerConfig) -> Array:
    """Initial mean [S, A]."""
    return jnp.zeros(shape)


def search(
    problem: Problem, carry: Array, key: Array, *, config: PlannerConfig
) -> tuple[Found, Array]:
    """Search with MPPI, as the module describes."""
    settings = config.mppi
    # As in TD-MPC2, the same in every iteration.
    proposals = None
    if problem.propose is not None:
        propose_key, key = jax.random.split(key)
        proposals = problem.propose(propose_key)

    def iterate(state: MPPIState, key: Array) -> tuple[MPPIState, None]:
        sample_key, score_key = jax.random.split(key)
        draw_key = jax.random.fold_in(sample_key, 1)
        noise = jax.random.normal(sample_key, (config.candidates, *problem.shape))
        samples = clip(state.mean[None] + state.std[None] * noise)
        samples = with_proposals(samples, proposals)
        scores = no_nan(problem.score(samples, score_key))
        elite_scores, indices = jax.lax.top_k(scores, config.elites)
        elite = samples[indices]
        # Equal weights where no candidate has a score.
        behind = jnp.where(elite_scores == elite_scores[0], 0, elite_scores - elite_scores[0])
        weights = jax.nn.softmax(settings.temperature * behind)
        mean = jnp.einsum("k,k...->...", weights, elite)
        variance = jnp.einsum("k,k...->...", weights, (elite - mean[None]) ** 2)
        improved = elite_scores[0] > state.best_score
        return MPPIState(
            mean=mean,
            std=jnp.clip(jnp.sqrt(variance), settings.min_std, settings.max_std),
            best=jnp.where(improved, elite[0], state.best),
            best_score=jnp.where(improved, elite_scores[0], state.best_score),
            drawn=elite[jax.random.choice(draw_key, config.elites, p=weights)]
            if config.answer == "sample"
            else state.drawn,
        ), None

    std = jnp.full(problem.shape, settings.max_std)
    worst = jnp.float32(-jnp.inf)
    state = MPPIState(mean=carry, std=std, best=carry, best_score=worst, drawn=carry)
    state, _ = jax.lax.scan(iterate, state, jax.random.split(key, config.iterations))
    if config.answer == "best":
        found = Found(state.best, state.best_score, state.mean, state.std)
    else:
        answer = state.drawn if config.answer == "sample" else state.mean
        found = Found(answer, None, state.mean, state.std)
    return found, shift(state.mean, problem.executed)


PLANNER = Planner(init, search, squash=clip)
