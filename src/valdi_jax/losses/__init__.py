"""The training objective, on one screen (paper, Supp. C, equation 9 and algorithm 1)."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from valdi_jax import model
from valdi_jax.config import Config
from valdi_jax.data import augment
from valdi_jax.dynamics import DYNAMICS
from valdi_jax.losses import dynamics, reward, sigreg, value
from valdi_jax.losses.base import Term, View
from valdi_jax.registry import Registry
from valdi_jax.types import Array, Batch, Draws, Params

TERMS: Registry[Term] = Registry(
    "--learn.terms",
    {
        "dynamics": dynamics.TERM,
        "sigreg": sigreg.TERM,
        "reward": reward.TERM,
        "value": value.TERM,
    },
)


def objective(
    params: Params, ema_params: Params, batch: Batch, draws: Draws, *, config: Config
) -> tuple[Array, dict[str, Array]]:
    """Total loss [] and the metrics, all scalars (equation 9).

    SIGReg weighs what the other terms leave: L = (1 - w) sum_i w_i L_i + w L_sigreg.

    Args:
        params: online networks; the gradient is taken with respect to them.
        ema_params: their moving average, for targets only.
        batch: B segments.
        draws: the update's randomness, as `draw` gives it.
        config: the run's configuration.
    """
    view = look(params, ema_params, batch, draws, config=config)
    losses: dict[str, Array] = {}
    metrics: dict[str, Array] = {}
    for name in config.learn.terms:
        term = TERMS[name]
        seen = view if "encoder" in term.trains else jax.lax.stop_gradient(view)
        losses[name], values = term.loss(
            {
                key: tree if key in term.trains else jax.lax.stop_gradient(tree)
                for key, tree in params.items()
            },
            ema_params,
            seen,
            draws.get(name),
            config=config,
        )
        metrics |= values
    weights = {name: TERMS[name].weight(config) for name in losses}
    share = weights.pop("sigreg", 0.0)
    rest = jnp.asarray(sum(weight * losses[name] for name, weight in weights.items()))
    total = (1 - share) * rest
    if "sigreg" in losses:
        total = total + share * losses["sigreg"]
    return total, metrics | {"loss/total": total} | {f"loss/{k}": x for k, x in losses.items()}


def look(params: Params, ema_params: Params, batch: Batch, draws: Draws, *, config: Config) -> View:
    """What the terms see of a batch; arguments as of `objective`.

    The first observation is encoded with gradient; the H that follow give the dynamics' targets
    under the EMA encoder, and all H + 1 that follow give the TD target's latents.
    """
    learn, horizon = config.learn, config.model.horizon
    lead = (batch.rewards.shape[0], horizon + 1)
    chex.assert_shape(batch.rewards, (*lead, config.model.chunk))
    chex.assert_shape(batch.actions, (*lead, config.model.chunk * config.model.action_dim))
    chex.assert_shape(batch.terminals, lead)
    if "augment" in draws:
        batch = augment.augment(batch, draws["augment"])
    first = jax.tree.map(lambda x: x[:, 0], batch.observations)
    following = jax.tree.map(lambda x: x[:, 1:], batch.observations)
    # The reference bootstraps through terminal steps: to it an episode has no end.
    terminals = jnp.zeros_like(batch.terminals) if learn.bootstrap_terminal else batch.terminals
    terminals = jnp.asarray(terminals)  # a batch may come from the host
    valid = before_end(terminals)
    z = model.encode(params, first, config=config)

    def encode_following(params: Params, steps: int) -> Array:
        observations = jax.tree.map(lambda x: x[:, :steps], following)
        return model.encode_targets(params, observations, config=config)

    if learn.td_encoder == "ema":  # one set of passes serves both
        next_latents = encode_following(ema_params, horizon + 1)
        targets = next_latents[:, :horizon]
    else:
        next_latents = encode_following(params, horizon + 1)
        targets = encode_following(ema_params, horizon)

    dynamics_loss, predicted = DYNAMICS[config.model.dynamics].predict(
        params["dynamics"],
        z,
        batch.actions[:, :horizon],
        targets,
        valid[:, :horizon],
        draws["dynamics"],
        config=config.model,
    )
    return View(
        z=z,
        trajectory=jnp.concatenate([z[:, None], predicted], axis=1),
        actions=jnp.asarray(batch.actions),
        rewards=learn.reward_scale * jnp.asarray(batch.rewards),
        terminals=terminals,
        valid=valid,
        targets=targets,
        next_latents=next_latents,
        dynamics_loss=dynamics_loss,
    )


def draw(key: Array, batch_size: int, *, config: Config) -> Draws:
    """The randomness of one update on ``batch_size`` segments, drawn in one place."""
    sources = {name: (TERMS[name].keys, TERMS[name].draw) for name in ("dynamics", "sigreg")}
    sources["augment"] = (2, augment.draw)
    # What is new comes last: the keys before it stay the same.
    others = (name for name in config.learn.terms if name not in sources)
    sources |= {name: (TERMS[name].keys, TERMS[name].draw) for name in others}
    keys = jax.random.split(key, sum(count for count, _ in sources.values()))
    draws, start = {}, 0
    for name, (count, source) in sources.items():
        draws[name] = source(keys[start : start + count], batch_size, config=config)
        start += count
    return draws


def before_end(terminals: Array) -> Array:
    """1 for a chunk up to the terminal one, 0 for those after it: [..., H + 1] -> the same."""
    alive = jnp.cumprod(1 - terminals, axis=-1)
    return jnp.concatenate([jnp.ones_like(alive[..., :1]), alive[..., :-1]], axis=-1)
