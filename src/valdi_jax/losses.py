"""The training objective, on one screen (paper, Supp. C, equation 9 and algorithm 1)."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from valdi_jax import model
from valdi_jax.config import Config
from valdi_jax.dynamics import training_prediction
from valdi_jax.sigreg import sigreg
from valdi_jax.types import Array, Batch, Draws, Observation, Params


def td_targets(
    rewards: Array, next_values: Array, terminals: Array, *, discount: float, bootstrap: bool
) -> Array:
    """One-step TD targets [..., H + 1] in world-model steps.

    Args:
        rewards: [..., H + 1, C] of each environment step.
        next_values: [..., H + 1] value after each chunk.
        terminals: [..., H + 1] 1 where the episode terminated within the chunk.
        discount: per environment step.
        bootstrap: bootstrap through terminal steps too.
    """
    chunk = rewards.shape[-1]
    chex.assert_equal_shape([rewards[..., 0], next_values, terminals])
    continues = jnp.ones_like(terminals) if bootstrap else 1 - terminals
    return chunk_rewards(rewards, discount=discount) + discount**chunk * continues * next_values


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
    under the EMA encoder, and all H + 1 that follow give the TD target's latents.
    """
    learn, horizon = config.learn, config.model.horizon
    first, following = _split(batch.observations)
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
        params["dynamics"], z, batch.actions[:, :horizon], targets, draws, config=config.model
    )
    trajectory = jnp.concatenate([z[:, None], predicted], axis=1)  # [B, H + 1, D]

    reward_target = chunk_rewards(batch.rewards, discount=learn.discount)
    reward_pred = model.reward(params, trajectory, batch.actions, config=config)
    reward_loss = jnp.mean((reward_pred - reward_target) ** 2)

    value_target = td_targets(
        batch.rewards,
        jax.lax.stop_gradient(model.value(ema_params, next_latents, config=config)),
        batch.terminals,
        discount=learn.discount,
        bootstrap=learn.bootstrap_terminal,
    )
    value_preds = model.values(params, trajectory, config=config)  # [E, B, H + 1]
    value_loss = jnp.mean((value_preds - value_target) ** 2)

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
        "value/mean": value_preds.mean(),
        "value/target_mean": value_target.mean(),
        "latent/std": z.std(axis=0).mean(),
    }


def _split(observations: Observation) -> tuple[Observation, Observation]:
    first = jax.tree.map(lambda x: x[:, 0], observations)
    following = jax.tree.map(lambda x: x[:, 1:], observations)
    return first, following
