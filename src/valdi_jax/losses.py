"""The training objective, on one screen (paper, Supp. C, equation 9 and algorithm 1)."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from valdi_jax import model
from valdi_jax.augment import augment
from valdi_jax.config import Config
from valdi_jax.dynamics import masked_mean, training_prediction
from valdi_jax.sigreg import sigreg
from valdi_jax.types import Array, Batch, Draws, Observation, Params


def td_targets(
    rewards: Array,
    next_values: Array,
    terminals: Array,
    *,
    discount: float,
    td_lambda: float = 0.0,
) -> Array:
    """TD(lambda) targets [..., H + 1] in world-model steps, one-step targets by default.

    Longer returns are those of the actions in the replay, without a correction for older policies.

    Args:
        rewards: [..., H + 1, C] of each environment step.
        next_values: [..., H + 1] value after each chunk.
        terminals: [..., H + 1] 1 where the episode terminated within the chunk: nothing follows.
        discount: per environment step.
        td_lambda: weight of the longer returns within the segment (Sutton & Barto, 2018, 12.18).
    """
    chunk = rewards.shape[-1]
    chex.assert_equal_shape([rewards[..., 0], next_values, terminals])
    rewards = chunk_rewards(rewards, discount=discount)
    continues = discount**chunk * (1 - terminals)
    if td_lambda == 0:
        return rewards + continues * next_values

    def step(after: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        reward, continues, value = inputs
        target = reward + continues * ((1 - td_lambda) * value + td_lambda * after)
        return target, target

    inputs = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), (rewards, continues, next_values))
    _, targets = jax.lax.scan(step, next_values[..., -1], inputs, reverse=True)
    return jnp.moveaxis(targets, 0, -1)


def chunk_rewards(rewards: Array, *, discount: float) -> Array:
    """Discounted reward of each chunk: [..., C] -> [...]."""
    return rewards @ (discount ** jnp.arange(rewards.shape[-1], dtype=rewards.dtype))


def objective(
    params: Params, ema_params: Params, batch: Batch, draws: Draws, *, config: Config
) -> tuple[Array, dict[str, Array]]:
    """Total loss [] and the metrics, all scalars (equation 9).

    Args:
        params: online networks; the gradient is taken with respect to them.
        ema_params: their moving average, for targets only.
        batch: B segments.
        draws: the update's randomness.
        config: the run's configuration.

    The first observation is encoded with gradient; the H that follow give the dynamics' targets
    under the EMA encoder, and all H + 1 that follow give the TD target's latents. What lies beyond
    an episode's end trains nothing.
    """
    learn, horizon = config.learn, config.model.horizon
    batch = augment(batch, draws)
    first, following = _split(batch.observations)
    # The reference bootstraps through terminal steps: to it an episode has no end.
    terminals = jnp.zeros_like(batch.terminals) if learn.bootstrap_terminal else batch.terminals
    valid = before_end(terminals)  # [B, H + 1]
    rewards = learn.reward_scale * batch.rewards
    z = model.encode(params, first, config=config)  # [B, D]

    def encode_following(params: Params, steps: int) -> Array:
        observations = jax.tree.map(lambda x: x[:, :steps], following)
        return model.encode_targets(params, observations, config=config)

    if learn.td_encoder == "ema":  # one set of passes serves both
        next_latents = encode_following(ema_params, horizon + 1)
        targets = next_latents[:, :horizon]
    else:
        next_latents = encode_following(params, horizon + 1)
        targets = encode_following(ema_params, horizon)

    dynamics_loss, predicted = training_prediction(
        params["dynamics"],
        z,
        batch.actions[:, :horizon],
        targets,
        valid[:, :horizon],
        draws,
        config=config.model,
    )
    trajectory = jnp.concatenate([z[:, None], predicted], axis=1)  # [B, H + 1, D]

    reward_target = chunk_rewards(rewards, discount=learn.discount)
    reward_pred = model.reward(params, trajectory, batch.actions, config=config)
    reward_loss = masked_mean((reward_pred - reward_target) ** 2, valid)

    value_target = td_targets(
        rewards,
        jax.lax.stop_gradient(model.value(ema_params, next_latents, config=config)),
        terminals,
        discount=learn.discount,
        td_lambda=learn.td_lambda,
    )
    value_preds = model.values(params, trajectory, config=config)  # [E, B, H + 1]
    value_loss = masked_mean((value_preds - value_target) ** 2, valid)

    sigreg_loss = sigreg(z, draws.directions, knots=learn.sigreg_knots)

    total = (1 - learn.sigreg_weight) * (
        learn.diffusion_weight * dynamics_loss
        + learn.reward_weight * reward_loss
        + learn.value_weight * value_loss
    ) + learn.sigreg_weight * sigreg_loss
    return total, {
        "loss/total": total,
        "loss/dynamics": dynamics_loss,
        "loss/reward": reward_loss,
        "loss/value": value_loss,
        "loss/sigreg": sigreg_loss,
        "value/mean": masked_mean(value_preds, valid),
        "value/target_mean": masked_mean(value_target, valid),
        "latent/std": z.std(axis=0).mean(),
    }


def before_end(terminals: Array) -> Array:
    """1 for a chunk up to the terminal one, 0 for those after it: [..., H + 1] -> the same."""
    alive = jnp.cumprod(1 - terminals, axis=-1)
    return jnp.concatenate([jnp.ones_like(alive[..., :1]), alive[..., :-1]], axis=-1)


def _split(observations: Observation) -> tuple[Observation, Observation]:
    first = jax.tree.map(lambda x: x[:, 0], observations)
    following = jax.tree.map(lambda x: x[:, 1:], observations)
    return first, following
