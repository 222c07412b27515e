"""The data that flows through the system.

Shape legend, used in every docstring of this package:

    B  batch                              H  horizon, in world-model steps (5)
    N  CEM candidates (512)               C  chunk: environment steps a world-model step (3)
    K  CEM elites (64)                    A  action size (3)
    I  CEM iterations (10)                D  latent size (64)
    T  diffusion timesteps (1000)         E  value heads (2)

A chunk of actions is stored flat, ``[C * A]``. Rewards are per environment step; the discount is
per environment step too, so one world-model step discounts by ``discount ** C``. With
``env.action_repeat`` an environment step is a whole hold.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import struct

Array = jax.Array
Params = dict[str, Any]


@struct.dataclass
class Observation:
    """What the agent sees. A modality that an environment lacks is ``None`` and costs nothing."""

    image: Array | None = None  # [..., height, width, channels] uint8
    vector: Array | None = None  # [..., vector_dim] float32

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axes, which both modalities share."""
        return self.vector.shape[:-1] if self.image is None else self.image.shape[:-3]


@struct.dataclass
class Batch:
    """Training segments: H + 2 observations that are C environment steps apart.

    Where an episode terminated within a chunk, the chunks after it are padding.
    """

    observations: Observation  # [B, H + 2, ...]
    actions: Array  # [B, H + 1, C * A], in [-1, 1]
    rewards: Array  # [B, H + 1, C]
    terminals: Array  # [B, H + 1] float32, 1 where the episode terminated within the chunk


@struct.dataclass
class Draws:
    """All the randomness of one update, so that the losses are deterministic functions of data."""

    noise: Array  # [B, H, D] standard normal
    timesteps: Array  # [B] int32, uniform on 0 .. T - 1
    directions: Array  # [D, directions] unit columns
    mirrored: Array | None = None  # [B] bool, segments whose left and right are exchanged
    shifts: Array | None = None  # [B, 2] int32, pixels that their frames are shifted by


@struct.dataclass
class AgentState:
    """Everything that an update changes."""

    params: Params  # online networks: encoder, dynamics, reward, value
    ema_params: Params  # exponential moving average of params
    optimizer: Any  # optax state
    step: Array  # [] int32, updates done
    key: Array  # PRNG key; each update folds the step into it


@struct.dataclass
class Plan:
    """What the planner answers."""

    actions: Array  # [H * C, A] in [-1, 1], one row an environment step
    predicted_return: Array  # [] discounted return that the model predicts, exploration aside; in
    # rewards times learn.reward_scale, and what lies beyond the horizon is the value's estimate
    mean: Array  # [H * C, A] final CEM mean, before tanh
    std: Array  # [H * C, A] final CEM standard deviation, before tanh
    carry: Array | None = None  # [H * C / hold, A] what the next plan starts from, if it does
