"""The interface of a planner, and the search problem it solves, which hides the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from valdi_jax.config import Config
from valdi_jax.types import Array, Plan


class Problem(NamedTuple):
    """A search problem.

    Attributes:
        shape: [S, A] of a sequence of actions.
        executed: leading actions that are executed before the next search.
        score: (sequences [N, S, A] in [-1, 1], key) -> scores [N], to be maximised; differentiable.
        propose: (key) -> sequences [P, S, A] of the policy prior, if there is one.
    """

    shape: tuple[int, int]
    executed: int
    score: Callable[[Array, Array], Array]
    propose: Callable[[Array], Array] | None = None


class Found(struct.PyTreeNode):
    """Result of a search."""

    sequence: Array  # [S, A] the chosen sequence, before the planner's squash
    score: Array | None  # [] of the sequence, if the search knows it
    mean: Array  # [S, A] of the last sampling distribution
    std: Array  # [S, A] of the last sampling distribution


class Planner(NamedTuple):
    """A search as pure functions; ``config`` is the `PlannerConfig`.

    Attributes:
        init: (shape [S, A], *, config) -> carry of an episode's first search, any pytree.
        search: (problem, carry, key, *, config) -> `Found`, and the next carry.
        squash: maps the search space to actions in [-1, 1], after exploration noise is added.
        plan: (params, observation, key, noise_std, carry, *, config) -> `Plan`, of a planner that
            samples plans instead of searching; here, and in its init, ``config`` is the whole.
        passes: (whole config) -> passes of the networks for each candidate: what a plan costs.
    """

    init: Callable[..., Any]
    search: Callable[..., tuple[Found, Any]]
    squash: Callable[[Array], Array]
    plan: Callable[..., Plan] | None = None
    passes: Callable[[Config], int] = lambda config: config.planner.iterations


def clip(actions: Array) -> Array:
    """The squash of planners that search in action space."""
    return jnp.clip(actions, -1, 1)


def no_nan(scores: Array) -> Array:
    """Scores [N] with NaN replaced by -inf, so that such candidates are chosen last."""
    return jnp.where(jnp.isnan(scores), -jnp.inf, scores)


def with_proposals(samples: Array, proposals: Array | None) -> Array:
    """Samples [N, S, A] of which the first P are the policy prior's [P, S, A], if there is one."""
    if proposals is None:
        return samples
    return jnp.concatenate([proposals, samples[proposals.shape[0] :]])


def shift(sequence: Array, executed: int) -> Array:
    """Drop the executed actions of a sequence [..., S, A] and append zeros."""
    rest = sequence[..., executed:, :]
    return jnp.concatenate([rest, jnp.zeros_like(sequence[..., :executed, :])], axis=-2)


def correlated_normal(key: Array, shape: tuple[int, ...], *, correlation: float) -> Array:
    """Standard normal noise [..., S, A], an AR(1) process along S.

    x_t = c x_{t-1} + sqrt(1 - c^2) e_t with the correlation c and independent normal e_t.
    """
    if correlation == 0:
        return jax.random.normal(key, shape)
    lag = np.subtract.outer(np.arange(shape[-2]), np.arange(shape[-2]))
    mixing = np.where(lag >= 0, correlation ** np.maximum(lag, 0), 0)
    mixing[:, 1:] *= np.sqrt(1 - correlation**2)  # all but the first are innovations
    return mix(key, shape, mixing)


def mix(key: Array, shape: tuple[int, ...], matrix: np.ndarray) -> Array:
    """Normal noise [..., S, A] whose covariance along S is M M^T, for a matrix M [S, any]."""
    noise = jax.random.normal(key, (*shape[:-2], matrix.shape[1], shape[-1]))
    return jnp.einsum("st,...ta->...sa", jnp.asarray(matrix, jnp.float32), noise)


def hold(sequences: Array, steps: int) -> Array:
    """Repeat each action of sequences [..., S, A] ``steps`` times: [..., S * steps, A]."""
    return jnp.repeat(sequences, steps, axis=-2)
