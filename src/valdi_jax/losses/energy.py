"""The energy: a classifier of replayed actions against others (MBDPO, 2605.26282)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from valdi_jax import model
from valdi_jax.config import Config
from valdi_jax.dynamics.base import masked_mean
from valdi_jax.losses.base import Term, View
from valdi_jax.types import Array, Params


class EnergyDraws(NamedTuple):
    """Random draws of one update, [B, H, C * A] each."""

    policy: Array  # standard normal, of the policy's sample
    noise: Array  # standard normal, added to it
    uniform: Array  # in [-1, 1]


def draw(keys: Array, batch_size: int, *, config: Config) -> EnergyDraws:
    """Draws from [3] keys."""
    shape = (batch_size, config.model.horizon, config.model.chunk * config.model.action_dim)
    return EnergyDraws(
        jax.random.normal(keys[0], shape),
        jax.random.normal(keys[1], shape),
        jax.random.uniform(keys[2], shape, minval=-1, maxval=1),
    )


def loss(
    params: Params, ema_params: Params, view: View, draws: EnergyDraws, *, config: Config
) -> tuple[Array, dict[str, Array]]:
    """Binary cross entropy of replayed chunks against the hardest of three others.

    These are the policy's sample, the same with noise, and a uniform one. Without a policy, the
    replayed chunk takes the place of its sample where noise is added.
    """
    horizon = config.model.horizon
    z, replayed, valid = view.trajectory[:, :-1], view.actions[:, :horizon], view.valid[:, :horizon]
    noise = config.learn.energy.noise * draws.noise
    if "policy" in params:
        sample = model.policy(params, z, draws.policy, config=config).action
        others = jnp.stack([sample, jnp.clip(sample + noise, -1, 1), draws.uniform])
    else:
        others = jnp.stack([jnp.clip(replayed + noise, -1, 1), draws.uniform])
    others = jax.lax.stop_gradient(others)

    def logits(actions: Array) -> Array:
        return model.energy(params, z, actions, config=config)

    each = jax.vmap(logits)(others)  # [candidates, B, H]
    # Every candidate has been evaluated: the hardest is the highest logit.
    negative = each.max(axis=0)
    positive = logits(replayed if config.learn.energy.aligned else misaligned(replayed))
    mean = (masked_mean(positive, valid) + masked_mean(negative, valid)) / 2
    square = masked_mean((positive - mean) ** 2, valid) + masked_mean((negative - mean) ** 2, valid)
    error = masked_mean(jax.nn.softplus(-positive), valid) + masked_mean(
        jax.nn.softplus(negative), valid
    )
    return error / 2, {
        "energy/replayed": masked_mean(positive, valid),
        "energy/negative": masked_mean(negative, valid),
        "energy/random": masked_mean(each[-1], valid),
        "energy/mean": mean,
        "energy/std": jnp.sqrt(square / 2),
    }


def misaligned(actions: Array) -> Array:
    """Chunks [B, H, C * A] as the authors' code pairs them with states.

    It flattens the states by time first and the actions by batch first.
    """
    batch, horizon = actions.shape[:2]
    return jnp.swapaxes(actions.reshape(horizon, batch, -1), 0, 1)


def track(
    statistics: dict[str, Array], metrics: dict[str, Array], *, config: Config
) -> dict[str, Array]:
    """Running mean and standard deviation of the logits."""
    rate = config.learn.energy.rate
    mean, std = statistics["energy_mean"], statistics["energy_std"]
    return {
        "energy_mean": mean + rate * (metrics["energy/mean"] - mean),
        "energy_std": std + rate * (jnp.maximum(metrics["energy/std"], 1e-6) - std),
    }


TERM = Term(
    trains=("energy",),
    weight=lambda config: config.learn.energy_weight,
    loss=loss,
    keys=3,
    draw=draw,
    track=track,
)
