"""MBDPO's search, a reverse diffusion over the action sequence (2605.26282).

Its score function is the softmax-weighted mean of the elites, and cancels: each step replaces the
mean by it and falls to the next, fixed noise level. The next decision starts from the shifted
answer. It searches in action space, with clipping.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax.config import MBDPOConfig, PlannerConfig
from valdi_jax.planners.base import Found, Planner, Problem, clip, shift, with_proposals
from valdi_jax.types import Array


class Level(NamedTuple):
    """What one iteration takes."""

    std: Array  # [] of the candidates
    sample_key: Array
    score_key: Array
    proposals: Array | None  # [P, S, A] of the policy prior, if there is one


def schedule(settings: MBDPOConfig) -> tuple[np.ndarray, np.float32]:
    """Falling standard deviations [M - 1] of the candidates, and the factor on the last mean."""
    betas = np.linspace(settings.beta_start, settings.beta_end, settings.steps)
    kept = np.cumprod(1 - betas)
    spread = np.sqrt((1 - kept) / kept)[:0:-1]
    return spread.astype(np.float32), np.float32(np.sqrt(kept[0]))


def weighted_mean(
    samples: Array, scores: Array, *, elites: int, temperature: float
) -> tuple[Array, Array, Array]:
    """Mean [S, A] of the K best samples [N, S, A], their weights [K] and indices [K].

    Weights are a softmax of the standardised scores [N]; NaN counts as the worst score.
    """
    finite = jnp.isfinite(scores)
    worst = jnp.min(jnp.where(finite, scores, jnp.inf))
    scores = jnp.where(finite, scores, jnp.where(jnp.isfinite(worst), worst, 0))
    std = jnp.std(scores, ddof=1)
    standard = (scores - scores.mean()) / jnp.where(std < 1e-4, 1, std)
    best, indices = jax.lax.top_k(standard, elites)
    weights = jax.nn.softmax(best / temperature)
    return jnp.einsum("k,k...->...", weights, samples[indices]), weights, indices


def init(shape: tuple[int, int], *, config: PlannerConfig) -> Array:
    """Initial mean [S, A]."""
    return jnp.zeros(shape)


def search(
    problem: Problem, carry: Array, key: Array, *, config: PlannerConfig
) -> tuple[Found, Array]:
    """Search from high to low noise, as the module describes."""
    spread, shrink = schedule(config.mbdpo)

    sample_keys, score_keys, propose_keys = jax.random.split(key, (3, len(spread)))
    # The prior's proposals do not depend on the mean: one batched rollout makes all levels'.
    proposals = None if problem.propose is None else jax.vmap(problem.propose)(propose_keys)

    def denoise(mean: Array, level: Level) -> tuple[Array, None]:
        noise = jax.random.normal(level.sample_key, (config.candidates, *problem.shape))
        samples = with_proposals(clip(mean[None] + level.std * noise), level.proposals)
        mean, _, _ = weighted_mean(
            samples,
            problem.score(samples, level.score_key),
            elites=config.elites,
            temperature=config.mbdpo.temperature,
        )
        return mean, None

    levels = Level(jnp.asarray(spread), sample_keys, score_keys, proposals)
    mean, _ = jax.lax.scan(denoise, carry, levels)
    answer = clip(shrink * mean)
    std = jnp.full(problem.shape, spread[-1])
    return Found(answer, None, answer, std), shift(answer, problem.executed)


PLANNER = Planner(init, search, squash=clip, passes=lambda config: config.planner.mbdpo.steps - 1)
