"""One jitted update step: AgentState -> AgentState (paper, algorithm 1, lines 12 to 21)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from valdi_jax.config import Config
from valdi_jax.data.episode import Episode
from valdi_jax.data.replay import Segments
from valdi_jax.data.store import Store, gather
from valdi_jax.errors import UsageError
from valdi_jax.losses import TERMS, draw, evaluate, objective_and_view
from valdi_jax.losses.base import View
from valdi_jax.losses.plans import PlanView
from valdi_jax.model import init_params, params_shapes
from valdi_jax.networks.normalizer import merge
from valdi_jax.networks.scaler import fit
from valdi_jax.observation import Observation
from valdi_jax.types import AgentState, Array, Batch, Draws, Params


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Adam with global-norm clipping (paper, Table 3)."""
    learn = config.learn
    return optax.chain(
        optax.clip_by_global_norm(learn.max_grad_norm),
        optax.adam(learn.learning_rate, b1=learn.adam_b1, b2=learn.adam_b2),
    )


def init_state(key: Array, observation: Observation, *, config: Config) -> AgentState:
    """Initialise an agent; ``observation`` is one example, without a batch axis."""
    params_key, key = jax.random.split(key)
    params = init_params(params_key, observation, config=config)
    return _first_state(params, key, config.graph)


def state_shapes(observation: Observation, *, config: Config) -> AgentState:
    """What `init_state` returns, as ``jax.ShapeDtypeStruct``s."""
    params = params_shapes(observation, config=config)
    return jax.eval_shape(
        lambda params, key: _first_state(params, key, config.graph), params, jax.random.key(0)
    )


@functools.partial(jax.jit, static_argnums=(2,))
def _first_state(params: Params, key: Array, config: Config) -> AgentState:
    return AgentState(
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        optimizer=make_optimizer(config).init(params),
        step=jnp.zeros((), jnp.int32),
        key=key,
        average=jax.tree.map(jnp.copy, params) if config.acts_with_average else None,
        after={
            name: _own_optimizer(config).init({key: params[key] for key in TERMS[name].trains})
            for name in _after(config)
        }
        or None,
    )


def _after(config: Config) -> list[str]:
    """Terms that take a step of their own."""
    return [name for name in config.learn.terms if TERMS[name].after]


def _own_optimizer(config: Config) -> optax.GradientTransformation:
    """Adam as TD-MPC2 uses it for its policy."""
    learn = config.learn
    return optax.chain(
        optax.clip_by_global_norm(learn.max_grad_norm),
        optax.adam(learn.learning_rate, b1=learn.adam_b1, b2=learn.adam_b2, eps=1e-5),
    )


def start_from(state: AgentState, params: Params) -> AgentState:
    """Replace the parameters of a fresh agent, and their moving averages."""
    return _with_each(state, lambda _: jax.tree.map(jnp.array, params))


def _with_each(state: AgentState, change: Callable[[Params], Params]) -> AgentState:
    """Change the parameters and their moving averages, which share no buffer.

    An update donates each of them.
    """
    return state.replace(
        params=change(state.params),
        ema_params=change(state.ema_params),
        average=None if state.average is None else change(state.average),
    )


def observe(state: AgentState, vectors: np.ndarray) -> AgentState:
    """Update the normaliser, if there is one, with vector observations [n, size]."""
    if "normalizer" not in state.params:
        return state
    before = state.params["normalizer"]
    # Keep the layout, because another one would recompile the update.
    statistics = jax.tree.map(
        lambda new, old: replicate(new, old.sharding), merge(before, vectors), before
    )
    return _with_each(
        state, lambda params: {**params, "normalizer": jax.tree.map(jnp.copy, statistics)}
    )


def fit_scalers(state: AgentState, episodes: Sequence[Episode], *, config: Config) -> AgentState:
    """Fit Diffuser's normalisers to the states and actions of recorded episodes.

    Raises:
        UsageError: if a state or action is constant, and so cannot be scaled.
    """
    if "scalers" not in state.params:
        return state
    data = {
        # The last state has no action: the authors' data do not hold it.
        "states": np.concatenate([episode.observations.vector[:-1] for episode in episodes])[
            :, : config.model.state_dim
        ],
        "actions": np.concatenate([episode.actions for episode in episodes]),
    }
    scalers = {name: fit(config.model.unet.scaler, rows) for name, rows in data.items()}
    for name, scaler in scalers.items():
        constant = np.flatnonzero(scaler.get("scale", np.ones(1)) == 0)
        if constant.size:
            raise UsageError(
                f"the recorded {name} do not vary in dimension {constant[0]}: "
                "--model.unet.scaler safe-limits takes such data"
            )
    device = jax.tree.leaves(state.params)[0].sharding
    return _with_each(
        state,
        lambda params: (
            params | {"scalers": jax.device_put(jax.tree.map(jnp.array, scalers), device)}
        ),
    )


def shardings(batch_size: int, devices: int) -> tuple[NamedSharding, NamedSharding] | None:
    """Shardings of a state and a batch over several devices; ``None`` for one.

    The state is replicated, the batch is split. Means are still over the whole batch, SIGReg's too.

    Raises:
        UsageError: if there are fewer devices, or they do not split the batch evenly.
    """
    if devices == 1 and jax.process_count() == 1:
        return None
    if devices > jax.device_count():
        raise UsageError(f"--learn.devices is {devices}; there are {jax.device_count()}")
    processes = jax.process_count()
    if devices % processes:
        raise UsageError(
            f"--learn.devices is {devices}; {processes} processes cannot have equally many of them"
        )
    if batch_size % devices:
        raise UsageError(
            f"--learn.batch-size is {batch_size}; {devices} devices cannot share it evenly: "
            "give another --learn.devices"
        )
    # Equally many of each process, which then holds consecutive rows.
    chosen = [
        device
        for process in range(processes)
        for device in _devices_of(process)[: devices // processes]
    ]
    mesh = Mesh(np.array(chosen), ("data",))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))


def _devices_of(process: int) -> list[jax.Device]:
    return [device for device in jax.devices() if device.process_index == process]


def replicate(tree: Any, where: Sharding) -> Any:
    """The same values on all devices, which each process has already: none are sent."""
    if where.is_fully_addressable:
        return jax.device_put(tree, where)
    assert isinstance(where, NamedSharding)
    devices = where.mesh.local_devices
    return jax.tree.map(
        lambda x: jax.make_array_from_single_device_arrays(
            x.shape, where, [jax.device_put(x, device) for device in devices]
        ),
        tree,
    )


def compile_update(state: AgentState, batch: Batch, *, config: Config) -> None:
    """Compile `update` for these arguments without making one."""
    _jitted_update.lower(state, batch, config=config.graph).compile()


def apply_update(
    state: AgentState, batch: Batch, draws: Draws, *, config: Config
) -> tuple[AgentState, dict[str, Array]]:
    """`update` with given random draws, neither jitted nor donating."""
    grads, (metrics, view) = jax.grad(objective_and_view, has_aux=True)(
        state.params, state.ema_params, batch, draws, config=config
    )
    updates, optimizer = make_optimizer(config).update(grads, state.optimizer, state.params)
    if config.learn.encoder_rate != 1:
        updates["encoder"] = optax.tree.scale(config.learn.encoder_rate, updates["encoder"])
    params = optax.apply_updates(state.params, updates)
    metrics["grad/norm"] = optax.tree.norm(grads)
    # The step too: an optimizer may turn finite gradients into non-finite steps.
    metrics["update/norm"] = optax.tree.norm(updates)
    checked = ["loss/total", "grad/norm", "update/norm"]
    after = {}
    for name in _after(config):
        params, after[name], values = _own_step(name, params, state, view, draws, config=config)
        metrics |= values
        checked += values
    params = _track(params, metrics, config=config)
    ema_params = _average(params, state.ema_params, _ema_rate(state.step, config))
    average = state.average
    if config.learn.act == "ema":
        average = ema_params
    elif config.learn.average:
        rate = 1 / (1 + config.learn.average * state.step.astype(jnp.float32))
        assert average is not None
        average = _average(params, average, rate)
    finite = jnp.isfinite(jnp.stack([metrics[name] for name in checked])).all()
    metrics["update/refused"] = 1 - finite.astype(jnp.float32)
    reached = state.replace(
        params=params,
        ema_params=ema_params,
        optimizer=optimizer,
        average=average,
        after=after or None,
    )
    state = jax.tree.map(functools.partial(jnp.where, finite), reached, state)
    return state.replace(step=state.step + 1), metrics


def _average(params: Params, average: Params, rate: float | Array) -> Params:
    """The moving average after a step of weight ``rate``; scalers are constant, and stay exact."""
    moved = optax.incremental_update(params, average, rate)
    return moved | {name: params[name] for name in ("scalers",) if name in params}


def _ema_rate(step: Array, config: Config) -> float | Array:
    """Weight of the online parameters in the moving average after update ``step``."""
    learn = config.learn
    if learn.ema_every == 1 and learn.ema_start == 0:
        return learn.ema_rate
    moved = jnp.where(step < learn.ema_start, 1.0, learn.ema_rate)
    return jnp.where(step % learn.ema_every == 0, moved, 0.0)


def _own_step(
    name: str,
    params: Params,
    state: AgentState,
    view: View | PlanView,
    draws: Draws,
    *,
    config: Config,
) -> tuple[Params, Any, dict[str, Array]]:
    """The step of a term with an optimizer of its own: parameters, its state, metrics."""
    trained = {key: params[key] for key in TERMS[name].trains}

    def loss(trained: Params) -> tuple[Array, dict[str, Array]]:
        return evaluate(name, params | trained, state.ema_params, view, draws, config=config)

    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(trained)
    assert state.after is not None
    updates, optimizer = _own_optimizer(config).update(grads, state.after[name], trained)
    norms = {f"loss/{name}": value, f"grad/{name}_norm": optax.tree.norm(grads)}
    return params | optax.apply_updates(trained, updates), optimizer, metrics | norms


def _track(params: Params, metrics: dict[str, Array], *, config: Config) -> Params:
    """Move the running statistics of the terms."""
    if "statistics" not in params:
        return params
    statistics = dict(params["statistics"])
    for name in config.learn.terms:
        track = TERMS[name].track
        if track is not None:
            statistics |= track(statistics, metrics, config=config)
    return params | {"statistics": statistics}


def update(
    state: AgentState, batch: Batch, *, config: Config
) -> tuple[AgentState, dict[str, Array]]:
    """One optimizer step, then the EMA. The state is donated: use the returned one.

    If the loss or gradient is not finite, only the step count changes.

    Returns:
        The new state, and scalar metrics. These are every loss term, the norms of the gradient
        (before clipping) and of the step, the mean value, the latents' standard deviation, and
        ``update/refused``, 1 if the update was not finite.
    """
    return _jitted_update(state, batch, config=config.graph)


def _update(
    state: AgentState, batch: Batch, *, config: Config
) -> tuple[AgentState, dict[str, Array]]:
    key = jax.random.fold_in(state.key, state.step)
    draws = draw(key, batch.actions.shape[0], config=config)
    return apply_update(state, batch, draws, config=config)


_jitted_update = jax.jit(_update, static_argnames=("config",), donate_argnums=(0,))


def update_from_store(
    state: AgentState, store: Store, segments: Segments, count: Array | np.int32, *, config: Config
) -> tuple[AgentState, dict[str, Array]]:
    """Several updates in one call, with batches gathered on the device.

    Args:
        state: the agent, donated: use the returned one.
        store: the replay buffer on the device.
        segments: [K, B, ...] of K updates.
        count: [] int32, how many of these to make, 1 .. K; it does not recompile.

    Returns: the new state, and the metrics of `update`, each [K]; 0 for updates not made.
    """
    return _update_from_store(state, store, segments, count, config=config.graph)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnums=(0,))
def _update_from_store(
    state: AgentState, store: Store, segments: Segments, count: Array, *, config: Config
) -> tuple[AgentState, dict[str, Array]]:
    def one(state: AgentState, segments: Segments) -> tuple[AgentState, dict[str, Array]]:
        return _update(state, gather(store, segments), config=config)

    def body(i: Array, carry: tuple[AgentState, dict[str, Array]]):
        state, values = one(carry[0], jax.tree.map(lambda x: x[i], segments))
        return state, jax.tree.map(lambda rows, value: rows.at[i].set(value), carry[1], values)

    first = jax.tree.map(lambda x: x[0], segments)
    shapes = jax.eval_shape(one, state, first)[1]
    size = segments.slots.shape[0]
    metrics = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), shapes)
    return jax.lax.fori_loop(0, count, body, (state, metrics))
