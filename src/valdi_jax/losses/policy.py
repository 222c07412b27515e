"""The policy prior's objective (TD-MPC2; Hansen et al., 2024)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from valdi_jax import model
from valdi_jax.config import Config
from valdi_jax.dynamics import DYNAMICS
from valdi_jax.dynamics.base import fading, masked_mean
from valdi_jax.losses.base import Term, View
from valdi_jax.types import Array, Params


class PolicyDraws(NamedTuple):
    """Random draws of one update."""

    noise: Array  # [B, H + 1, C * A] of the samples
    pair: Array | None  # [2] int, the critics that are averaged, if there are any


def draw(keys: Array, batch_size: int, *, config: Config) -> PolicyDraws:
    """Draws from [2] keys."""
    shape = (batch_size, config.model.horizon + 1, config.model.chunk * config.model.action_dim)
    critics = "q" in config.model.networks
    pair = model.draw_pair(keys[1], config=config) if critics else None
    return PolicyDraws(jax.random.normal(keys[0], shape), pair)


def action_value(
    params: Params, z: Array, action: Array, pair: Array | None, *, config: Config
) -> Array:
    """Value [...] of a chunk [..., C * A] at latents [..., D]: the mean of two critics.

    Without critics, the reward and the value of the next latent, imagined in one step.
    """
    if pair is not None:
        return model.q_values(params, z, action, config=config)[pair].mean(axis=0)
    following = model.imagine_step(params["dynamics"], z, action, config=config.model)
    later = config.learn.discount**config.model.chunk * model.value(
        params, following, config=config
    )
    return model.reward(params, z, action, config=config) + later


def loss(
    params: Params, ema_params: Params, view: View, draws: PolicyDraws, *, config: Config
) -> tuple[Array, dict[str, Array]]:
    """Minus value and entropy of samples at the predicted latents, or at the first alone.

    The value is divided by a running range: its 5th to 95th percentile at the first latent.
    """
    settings = config.learn.policy
    # Without critics, a model of whole trajectories would imagine one for each of these latents.
    steps = 1 if draws.pair is None and whole_trajectories(config) else config.model.horizon + 1
    z, actions, valid = (x[:, :steps] for x in (view.trajectory, view.actions, view.valid))
    sample = model.policy(params, z, draws.noise[:, :steps], config=config)
    values = action_value(params, z, sample.action, draws.pair, config=config)
    low, high = jnp.percentile(jax.lax.stop_gradient(values[:, 0]), jnp.array([5.0, 95.0]))
    spread = params["statistics"]["q_range"]
    spread = spread + settings.scale_rate * (jnp.maximum(high - low, 1) - spread)
    gain = settings.entropy * sample.scaled_entropy + values / spread
    weights = fading(steps, config.model.rho)[None]
    drift = jnp.abs(jnp.tanh(sample.mean) - actions).mean(axis=-1)
    return -masked_mean(gain * weights, valid), {
        "policy/q_range": spread,
        "policy/entropy": masked_mean(sample.entropy, valid),
        "policy/drift": masked_mean(drift, valid),
    }


def whole_trajectories(config: Config) -> bool:
    """Whether the world model imagines whole trajectories, not single steps."""
    return DYNAMICS[config.model.dynamics].step is None


def track(
    statistics: dict[str, Array], metrics: dict[str, Array], *, config: Config
) -> dict[str, Array]:
    """The range that the loss has moved."""
    return {"q_range": metrics["policy/q_range"]}


TERM = Term(
    trains=("policy",),
    weight=lambda config: 1.0,
    loss=loss,
    keys=2,
    draw=draw,
    after=True,
    track=track,
)
