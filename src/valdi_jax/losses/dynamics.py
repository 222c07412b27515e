"""The dynamics loss, defined by the world model (equation 7)."""

from __future__ import annotations

from typing import Any

from valdi_jax.config import Config
from valdi_jax.dynamics import DYNAMICS
from valdi_jax.losses.base import Term, View
from valdi_jax.types import Array, Params


def draw(keys: Array, batch_size: int, *, config: Config) -> Any:
    """The world model's random draws, from [2] keys."""
    return DYNAMICS[config.model.dynamics].draw(keys, batch_size, config=config.model)


def loss(
    params: Params, ema_params: Params, view: View, draws: Any, *, config: Config
) -> tuple[Array, dict[str, Array]]:
    """The loss that was computed along with the trajectory."""
    return view.dynamics_loss, {}


TERM = Term(
    trains=("encoder", "dynamics"),
    weight=lambda config: config.learn.diffusion_weight,
    loss=loss,
    keys=2,
    draw=draw,
)
