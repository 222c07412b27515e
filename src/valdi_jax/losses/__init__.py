"""The training objective (paper, Supp. C, equation 9 and algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from valdi_jax import model
from valdi_jax.config import Config
from valdi_jax.data import augment
from valdi_jax.dynamics import DYNAMICS
from valdi_jax.errors import UsageError
from valdi_jax.losses import dynamics, energy, plans, policy, prior, q, reward, sigreg, value
from valdi_jax.losses.base import Term, View
from valdi_jax.losses.plans import PlanView, look_at_plans
from valdi_jax.registry import Registry
from valdi_jax.types import Array, Batch, Draws, Params

TERMS: Registry[Term] = Registry(
    "--learn.terms",
    {
        "dynamics": dynamics.TERM,
        "sigreg": sigreg.TERM,
        "reward": reward.TERM,
        "value": value.TERM,
        "q": q.TERM,
        "energy": energy.TERM,
        "policy": policy.TERM,
        "prior": prior.TERM,
        "plan": plans.TERM,
        "plan_value": plans.VALUE_TERM,
    },
)


def trains_encoder(config: Config) -> bool:
    """Whether the encoder learns; one that does not could not follow its moving normaliser."""
    learns = any("encoder" in TERMS[name].trains for name in config.learn.terms)
    return learns and config.learn.encoder_rate > 0


def objective(
    params: Params, ema_params: Params, batch: Batch, draws: Draws, *, config: Config
) -> tuple[Array, dict[str, Array]]:
    """Total loss [] and scalar metrics (equation 9).

    L = (1 - w) sum_i w_i L_i + w L_sigreg, where i runs over the terms other than SIGReg.

    Args:
        params: online networks, which receive the gradient.
        ema_params: their moving average, for targets only.
        batch: B segments.
        draws: the update's random draws, from `draw`.
    """
    total, (metrics, _) = objective_and_view(params, ema_params, batch, draws, config=config)
    return total, metrics


def objective_and_view(
    params: Params, ema_params: Params, batch: Batch, draws: Draws, *, config: Config
) -> tuple[Array, tuple[dict[str, Array], View | PlanView]]:
    """`objective`, and the encoded batch for the terms that take a step of their own."""
    view: View | PlanView
    metrics: dict[str, Array] = {}
    if config.diffuses_plans:
        view = look_at_plans(params, batch, config=config)
    else:
        view = look(params, ema_params, batch, draws, config=config)
        metrics["latent/std"] = view.z.std(axis=0).mean()
    losses: dict[str, Array] = {}
    for name in config.learn.terms:
        if TERMS[name].after:
            continue
        losses[name], values = evaluate(name, params, ema_params, view, draws, config=config)
        metrics |= values
    weights = {name: TERMS[name].weight(config) for name in losses}
    share = weights.pop("sigreg", 0.0)
    rest = jnp.asarray(sum(weight * losses[name] for name, weight in weights.items()))
    total = (1 - share) * rest
    if "sigreg" in losses:
        total = total + share * losses["sigreg"]
    metrics |= {"loss/total": total} | {f"loss/{k}": x for k, x in losses.items()}
    return total, (metrics, view)


def evaluate(
    name: str,
    params: Params,
    ema_params: Params,
    view: View | PlanView,
    draws: Draws,
    *,
    config: Config,
) -> tuple[Array, dict[str, Array]]:
    """One term's loss and metrics, with gradients only into what it trains."""
    term = TERMS[name]
    answer = term.loss(
        {
            key: tree if key in term.trains else jax.lax.stop_gradient(tree)
            for key, tree in params.items()
        },
        ema_params,
        view if "encoder" in term.trains else jax.lax.stop_gradient(view),
        draws.get(name),
        config=config,
    )
    pair = isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict)
    if not pair or jnp.shape(answer[0]):
        raise UsageError(f"--learn.terms {name}: its loss has to return a scalar and a dict")
    return answer


def ends(batch: Batch, *, config: Config) -> Array:
    """Where training takes an episode to end [B, H + 1], within the chunk."""
    # The reference bootstraps through terminal steps, as if episodes had no end.
    none = config.learn.bootstrap_terminal
    terminals = jnp.zeros_like(batch.terminals) if none else batch.terminals
    return jnp.asarray(terminals)  # a batch may come from the host


def view(
    batch: Batch,
    z: Array,
    predicted: Array,
    targets: Array,
    next_latents: Array,
    dynamics_loss: Array,
    *,
    config: Config,
) -> View:
    """What all terms share of a batch with its latents, shaped as in `View`."""
    terminals = ends(batch, config=config)
    valid = before_end(terminals)
    return View(
        z=z,
        trajectory=jnp.concatenate([z[:, None], predicted], axis=1),
        actions=jnp.asarray(batch.actions),
        rewards=config.learn.reward_scale * jnp.asarray(batch.rewards),
        terminals=terminals,
        valid=valid,
        scored=valid if config.learn.last_step else valid.at[:, -1].set(0),
        targets=targets,
        next_latents=next_latents,
        dynamics_loss=dynamics_loss,
    )


def look(params: Params, ema_params: Params, batch: Batch, draws: Draws, *, config: Config) -> View:
    """Encode a batch and predict its latents, for all terms; arguments as in `objective`.

    The first observation is encoded with gradient. The EMA encodings of the next H are the targets
    of the dynamics, and all H + 1 that follow give the latents of the TD target.
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
    valid = before_end(ends(batch, config=config))
    z = model.encode(params, first, config=config)

    def encode_following(params: Params, steps: int) -> Array:
        observations = jax.tree.map(lambda x: x[:, :steps], following)
        return model.encode_targets(params, observations, config=config)

    encoders = {"ema": ema_params, "online": params}
    next_latents = encode_following(encoders[learn.td_encoder], horizon + 1)
    if learn.target_encoder == learn.td_encoder:  # one pass serves both
        targets = next_latents[:, :horizon]
    else:
        targets = encode_following(encoders[learn.target_encoder], horizon)

    dynamics_loss, predicted = DYNAMICS[config.model.dynamics].predict(
        params["dynamics"],
        z,
        batch.actions[:, :horizon],
        targets,
        valid[:, :horizon],
        draws["dynamics"],
        config=config.model,
    )
    return view(batch, z, predicted, targets, next_latents, dynamics_loss, config=config)


def draw(key: Array, batch_size: int, *, config: Config) -> Draws:
    """All random draws of one update on ``batch_size`` segments."""
    sources: dict[str, tuple[int, Callable[..., Any]]] = {}
    if not config.diffuses_plans:
        sources = {name: (TERMS[name].keys, TERMS[name].draw) for name in ("dynamics", "sigreg")}
        sources["augment"] = (2, augment.draw)
    # Other terms come last, so that these keys stay the same.
    others = (name for name in config.learn.terms if name not in sources)
    sources |= {name: (TERMS[name].keys, TERMS[name].draw) for name in others}
    keys = jax.random.split(key, sum(count for count, _ in sources.values()))
    draws, start = {}, 0
    for name, (count, source) in sources.items():
        draws[name] = source(keys[start : start + count], batch_size, config=config)
        start += count
    return draws


def before_end(terminals: Array) -> Array:
    """1 up to and including the terminal chunk, 0 after it; shapes [..., H + 1]."""
    alive = jnp.cumprod(1 - terminals, axis=-1)
    return jnp.concatenate([jnp.ones_like(alive[..., :1]), alive[..., :-1]], axis=-1)
