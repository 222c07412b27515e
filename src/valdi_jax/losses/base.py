"""What a term of the objective is, and what it sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import struct

from valdi_jax.config import Config
from valdi_jax.types import Array


class View(struct.PyTreeNode):
    """What one update shows to all terms. Gradients flow from it into encoder and dynamics.

    What lies beyond an episode's end trains nothing: ``valid`` is 0 there.
    """

    z: Array  # [B, D] online latent of the first observation
    trajectory: Array  # [B, H + 1, D] z, and the latents that the dynamics predicts
    actions: Array  # [B, H + 1, C * A]
    rewards: Array  # [B, H + 1, C] times learn.reward_scale
    terminals: Array  # [B, H + 1] 1 where the episode ends within the chunk
    valid: Array  # [B, H + 1] 0 for what is padding
    targets: Array  # [B, H, D] EMA latents of the next H observations, without gradient
    next_latents: Array  # [B, H + 1, D] latents for TD targets, without gradient
    dynamics_loss: Array  # []


def no_draw(keys: Array, batch_size: int, *, config: Config) -> None:
    """Nothing: the term is deterministic."""


class Term(NamedTuple):
    """One term of the objective.

    Attributes:
        trains: names of the networks that it may move. Gradients stop at all others; at the view
            as well, unless one of them is the encoder.
        weight: (config) -> its weight.
        loss: (params, ema_params, view, draws, *, config) -> the loss [] and metrics, all scalars.
        keys: how many PRNG keys its randomness takes.
        draw: (keys, batch size, *, config) -> its randomness of one update, any pytree.
    """

    trains: tuple[str, ...]
    weight: Callable[[Config], float]
    loss: Callable[..., tuple[Array, dict[str, Array]]]
    keys: int = 0
    draw: Callable[..., Any] = no_draw
