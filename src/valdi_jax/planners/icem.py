"""iCEM, sample-efficient CEM (Pinneri et al., 2020).

It adds to CEM: noise correlated over time; a decaying number of candidates; elites kept for the
next iteration and, shifted, for the next decision; the mean as one of the last candidates; a
warm-started mean. It searches in action space, with clipping.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax.config import PlannerConfig
from valdi_jax.planners.base import Found, Planner, Problem, clip, mix, no_nan, shift
from valdi_jax.types import Array


class Carry(NamedTuple):
    """What the next decision starts from."""

    mean: Array  # [S, A]
    elites: Array  # [kept, S, A]
    known: Array  # [] bool, whether the elites are valid


def population(iteration: int, config: PlannerConfig) -> int:
    """Candidates sampled in an iteration: N decay^-i, at least 2 K, at most N."""
    count = int(config.candidates * config.icem.decay**-iteration)
    return min(config.candidates, max(count, 2 * config.elites))


def colored_normal(key: Array, shape: tuple[int, ...], *, exponent: float) -> Array:
    """Standard normal noise [..., S, A] whose power along S falls as frequency ** -exponent."""
    return mix(key, shape, _coloring(shape[-2], exponent))


def _coloring(steps: int, exponent: float) -> np.ndarray:
    """Matrix [S, S] that turns white noise into coloured noise of unit variance."""
    frequencies = np.fft.rfftfreq(steps)
    frequencies[0] = frequencies[1] if steps > 1 else 1  # the mean is as strong as the slowest wave
    power = np.concatenate([frequencies, frequencies[1 : (steps + 1) // 2]]) ** -exponent
    waves = np.concatenate(
        [
            np.fft.irfft(np.eye(len(frequencies)), n=steps),
            np.fft.irfft(1j * np.eye(len(frequencies))[1 : (steps + 1) // 2], n=steps),
        ]
    )  # [S, S]: cosines, then sines
    waves /= np.linalg.norm(waves, axis=1, keepdims=True)
    matrix = (np.sqrt(power)[:, None] * waves).T
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def init(shape: tuple[int, int], *, config: PlannerConfig) -> Carry:
    """Zero mean, no elites."""
    elites = jnp.zeros((_kept(config), *shape))
    return Carry(jnp.zeros(shape), elites, jnp.zeros((), bool))


def search(
    problem: Problem, carry: Carry, key: Array, *, config: PlannerConfig
) -> tuple[Found, Carry]:
    """Search with iCEM, as the module describes."""
    settings, kept = config.icem, _kept(config)
    mean, std = carry.mean, jnp.full(problem.shape, settings.std)
    elite = carry.elites
    best, best_score = mean, jnp.float32(-jnp.inf)
    # Unrolled, because the number of candidates differs between iterations.
    for i, iteration_key in enumerate(jax.random.split(key, config.iterations)):
        sample_key, score_key = jax.random.split(iteration_key)
        shape = (population(i, config), *problem.shape)
        noise = colored_normal(sample_key, shape, exponent=settings.noise_exponent)
        samples = clip(mean[None] + std[None] * noise)
        if i == config.iterations - 1:
            samples = samples.at[0].set(mean)
        samples = jnp.concatenate([samples, elite[:kept]])
        scores = no_nan(problem.score(samples, score_key))
        if i == 0:
            known = carry.known | (jnp.arange(len(samples)) < shape[0])
            scores = jnp.where(known, scores, -jnp.inf)
        elite_scores, indices = jax.lax.top_k(scores, config.elites)
        elite = samples[indices]
        improved = elite_scores[0] > best_score
        best = jnp.where(improved, elite[0], best)
        best_score = jnp.where(improved, elite_scores[0], best_score)
        mean = settings.momentum * mean + (1 - settings.momentum) * elite.mean(axis=0)
        std = settings.momentum * std + (1 - settings.momentum) * elite.std(axis=0)
    carry = Carry(
        mean=shift(mean, problem.executed),
        elites=shift(elite[:kept], problem.executed),
        known=jnp.ones((), bool),
    )
    if config.answer == "best":
        return Found(best, best_score, mean, std), carry
    return Found(mean, None, mean, std), carry


def _kept(config: PlannerConfig) -> int:
    return round(config.icem.kept * config.elites)


PLANNER = Planner(init, search, squash=clip)
