"""The data that flows through the system.

Shape legend, used in every docstring of this package:

    B  batch                              H  horizon, in world-model steps (5)
    N  candidates of a planner (512)      C  chunk: environment steps a world-model step (3)
    K  elites of a planner (64)           A  action size (3)
    I  iterations of a planner (10)       D  latent size (64)
    T  diffusion timesteps (1000)         E  value heads (2)
                                          S  actions searched: H * C / planner.action_hold

A chunk of actions is stored flat, ``[C * A]``. Rewards are per environment step; the discount is
per environment step too, so one world-model step discounts by ``discount ** C``. With
``env.action_repeat`` an environment step is a whole hold.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import struct

from valdi_jax.observation import Observation

Array = jax.Array
Params = dict[str, Any]
Draws = dict[str, Any]  # the randomness of one update, by the term of the objective


class Batch(struct.PyTreeNode):
    """Training segments: H + 2 observations that are C environment steps apart.

    Where an episode terminated within a chunk, the chunks after it are padding.
    """

    observations: Observation  # [B, H + 2, ...]
    actions: Array | np.ndarray  # [B, H + 1, C * A], in [-1, 1]
    rewards: Array | np.ndarray  # [B, H + 1, C]
    terminals: Array | np.ndarray  # [B, H + 1] float32, 1 where it terminated within the chunk


class AgentState(struct.PyTreeNode):
    """Everything that an update changes."""

    params: Params  # online networks: encoder, dynamics, reward, value
    ema_params: Params  # exponential moving average of params
    optimizer: Any  # optax state
    step: Array  # [] int32, updates done
    key: Array  # PRNG key; each update folds the step into it


class Plan(struct.PyTreeNode):
    """What the planner answers."""

    actions: Array  # [H * C, A] in [-1, 1], one row an environment step
    predicted_return: Array  # [] discounted return that the model predicts, exploration aside; in
    # rewards times learn.reward_scale, and what lies beyond the horizon is the value's estimate
    mean: Array  # [H * C, A] of the last sampling distribution, before the planner's squash
    std: Array  # [H * C, A] of the last sampling distribution, before the planner's squash
    carry: Any = None  # what the next plan of the episode starts from, if anything
