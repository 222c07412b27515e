"""Valdi: Value Diffusion World Models, in JAX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from valdi_jax.agent import Agent
    from valdi_jax.config import Config
    from valdi_jax.model import encode, imagine, init_params, reward, value
    from valdi_jax.observation import Observation
    from valdi_jax.planners import plan
    from valdi_jax.planners.cem import cem
    from valdi_jax.presets import PRESETS
    from valdi_jax.types import AgentState, Batch, Plan
    from valdi_jax.updates import init_state, update

# Loaded lazily, so that processes which only step environments need no JAX.
_HOMES = {
    "agent": ("Agent",),
    "config": ("Config",),
    "model": ("encode", "imagine", "init_params", "reward", "value"),
    "observation": ("Observation",),
    "planners": ("plan",),
    "planners.cem": ("cem",),
    "presets": ("PRESETS",),
    "types": ("AgentState", "Batch", "Plan"),
    "updates": ("init_state", "update"),
}

__all__ = [
    "PRESETS",
    "Agent",
    "AgentState",
    "Batch",
    "Config",
    "Observation",
    "Plan",
    "cem",
    "encode",
    "imagine",
    "init_params",
    "init_state",
    "plan",
    "reward",
    "update",
    "value",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"valdi_jax.{module}"), name)
    raise AttributeError(f"module 'valdi_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
