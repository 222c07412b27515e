"""Shared data structures.

Shape legend, used in every docstring of this package:

    B  batch                              H  horizon, in world-model steps (5)
    N  candidates of a planner (512)      C  chunk: environment steps per world-model step (3)
    K  elites of a planner (64)           A  action size (3)
    I  iterations of a planner (10)       D  latent size (64)
    T  diffusion timesteps (1000)         E  value heads (2)
    X  state size of Diffuser's plans     S  actions searched: H * C / planner.action_hold
    M  noise levels of MBDPO's search

Action chunks are stored flat, ``[C * A]``. Rewards and the discount are per environment step, so
one world-model step discounts by ``discount ** C``. With ``env.action_repeat``, one hold
counts as one environment step.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import struct

from valdi_jax.observation import Observation

Array = jax.Array
Params = dict[str, Any]
Draws = dict[str, Any]  # random draws of one update, by objective term


class Batch(struct.PyTreeNode):
    """Training segments: H + 2 observations, C environment steps apart.

    Chunks after a terminal one are padding.
    """

    observations: Observation  # [B, H + 2, ...]
    actions: Array | np.ndarray  # [B, H + 1, C * A], in [-1, 1]
    rewards: Array | np.ndarray  # [B, H + 1, C]
    terminals: Array | np.ndarray  # [B, H + 1] float32, 1 if terminated within the chunk
    within: Array | np.ndarray | None = None  # [B, (H + 1) * C] float32, 0 beyond an episode's end


class AgentState(struct.PyTreeNode):
    """The state that an update changes."""

    params: Params  # online networks, by name, and running statistics
    ema_params: Params  # exponential moving average of params
    optimizer: Any  # optax state
    step: Array  # [] int32, updates done
    key: Array  # PRNG key; each update folds the step into it
    average: Params | None = None  # what acts in place of params (learn.average, learn.act)
    after: dict[str, Any] | None = None  # optax states of the terms with a step of their own

    @property
    def acting(self) -> Params:
        """The parameters to act with: the slow average if there is one."""
        return self.params if self.average is None else self.average


class Plan(struct.PyTreeNode):
    """Result of a plan."""

    actions: Array  # [H * C, A] in [-1, 1], one row an environment step
    predicted_return: Array  # [] predicted discounted return of the plan without exploration noise,
    # including the value estimate beyond the horizon; scaled by learn.reward_scale
    mean: Array  # [H * C, A] of the last sampling distribution, before the planner's squash
    std: Array  # [H * C, A] of the last sampling distribution, before the planner's squash
    carry: Any = None  # planner state for the episode's next plan, if any
    metrics: dict[str, Array] = struct.field(default_factory=dict)  # [] each, of its first chunk
