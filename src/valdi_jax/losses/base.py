"""The interface of an objective term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import struct

from valdi_jax.config import Config, ModelConfig
from valdi_jax.networks.twohot import cross_entropy
from valdi_jax.types import Array


class View(struct.PyTreeNode):
    """Inputs that all terms of one update share, with gradients into encoder and dynamics.

    Chunks beyond an episode's end train nothing: ``valid`` is 0 there.
    """

    z: Array  # [B, D] online latent of the first observation
    trajectory: Array  # [B, H + 1, D] z and the predicted latents
    actions: Array  # [B, H + 1, C * A]
    rewards: Array  # [B, H + 1, C] times learn.reward_scale
    terminals: Array  # [B, H + 1] 1 where the episode ends within the chunk
    valid: Array  # [B, H + 1] 0 for padding
    scored: Array  # [B, H + 1] where the heads are trained: ``valid``, or without the last step
    targets: Array  # [B, H, D] latents of the next H observations to predict, without gradient
    next_latents: Array  # [B, H + 1, D] latents for TD targets, without gradient
    dynamics_loss: Array  # []


def no_draw(keys: Array, batch_size: int, *, config: Config) -> None:
    """The draws of a deterministic term."""


def regression(output: Array, target: Array, *, config: ModelConfig) -> Array:
    """Error [...] of a head: squared for scalars [...], cross entropy for logits [..., bins]."""
    return cross_entropy(output, target) if config.bins else (output - target) ** 2


class Term(NamedTuple):
    """One term of the objective.

    Attributes:
        trains: names of the networks that it trains. Gradients into all others are stopped, and
            into the view too unless the encoder is among them.
        weight: (config) -> its weight in the sum; of no effect on a step of its own.
        loss: (params, ema_params, view, draws, *, config) -> the loss [] and scalar metrics.
        keys: number of PRNG keys that ``draw`` takes.
        draw: (keys, batch size, *, config) -> its random draws of one update, any pytree.
        needs: names of further networks that it uses.
        after: whether it takes a step of its own, with its own optimizer, after that of all others
            and with the parameters that they have reached.
        track: (statistics, metrics, *, config) -> those of ``params["statistics"]`` that it moves.
    """

    trains: tuple[str, ...]
    weight: Callable[[Config], float]
    loss: Callable[..., tuple[Array, dict[str, Array]]]
    keys: int = 0
    draw: Callable[..., Any] = no_draw
    needs: tuple[str, ...] = ()
    after: bool = False
    track: Callable[..., dict[str, Array]] | None = None
