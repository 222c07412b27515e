"""Valdi: Value Diffusion World Models, in JAX."""

from valdi_jax.config import PRESETS, Config
from valdi_jax.model import encode, imagine, init_params, reward, value
from valdi_jax.planner import cem, plan
from valdi_jax.types import AgentState, Batch, Observation, Plan
from valdi_jax.update import init_state, update

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
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
