"""The prior of the guided planner: Diffuser's loss on action chunks and latents."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from valdi_jax import model
from valdi_jax.config import Config
from valdi_jax.diffusion import cosine_posterior
from valdi_jax.losses.base import Term, View
from valdi_jax.losses.plans import PlanDraws, plan_loss
from valdi_jax.types import Array, Params


def draw(keys: Array, batch_size: int, *, config: Config) -> PlanDraws:
    """Draws from [2] keys."""
    settings = config.model
    width = settings.chunk * settings.action_dim + settings.latent_dim
    timesteps = jax.random.randint(keys[0], (batch_size,), 0, settings.prior.timesteps)
    noise = jax.random.normal(keys[1], (batch_size, settings.horizon, width))
    return PlanDraws(timesteps, noise)


def loss(
    params: Params, ema_params: Params, view: View, draws: PlanDraws, *, config: Config
) -> tuple[Array, dict[str, Array]]:
    """Squared error of replayed chunks and the latents after them, estimated from noised ones."""
    horizon = config.model.horizon
    clean = jnp.concatenate([view.actions[:, :horizon], view.targets], axis=-1)
    valid = view.valid[:, :horizon]
    error = plan_loss(
        functools.partial(model.denoise_prior, params, view.z, config=config),
        clean,
        *draws,
        model.known_of_prior(config),
        posterior=cosine_posterior(config.model.prior.timesteps),
        weights=(valid / valid.mean())[..., None],
    )
    return error, {}


# A step of its own leaves the world model as it would be without the prior.
TERM = Term(trains=("prior",), weight=lambda config: 1.0, loss=loss, keys=2, draw=draw, after=True)
