"""The learner: an agent, its replay buffer and its updates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from valdi_jax.config import Config
from valdi_jax.data.episode import Episode
from valdi_jax.data.replay import Replay, Segments
from valdi_jax.data.source import SOURCES
from valdi_jax.data.store import Store, store_episode, store_shapes
from valdi_jax.data.windows import prepared
from valdi_jax.dynamics import DYNAMICS
from valdi_jax.errors import StoppedError, UsageError
from valdi_jax.losses import TERMS, trains_encoder
from valdi_jax.model import NETWORKS
from valdi_jax.observation import Observation
from valdi_jax.planners import PLANNERS
from valdi_jax.registry import Registry
from valdi_jax.run import npz
from valdi_jax.run.processes import Processes
from valdi_jax.types import AgentState, Array, Batch, Params
from valdi_jax.updates import (
    compile_update,
    observe,
    replicate,
    shardings,
    update,
    update_from_store,
)

_STORE_SHARE = 0.8  # largest share of the device's free memory for the replay buffer


class Learner:
    """An agent that learns from its replay buffer.

    Args:
        state: the agent, on one device; it is replicated on all that share its updates.
        example: one observation, without a batch axis.
        config: the run's configuration.
        run_dir: where the batches of non-finite updates are saved.
        say: called with a message about such an update.
        recorded: episodes that stay in the replay buffer.
        processes: those that share its updates, each with a learner and all of its episodes.

    Attributes:
        state: the agent after the last update.
        replay: its replay buffer.
        updates: number of updates made, on the host.
        placement: where segments are gathered, ``"device"`` or ``"host"``.
        devices: how many share an update.

    Raises:
        UsageError: if the placement is impossible, or the devices cannot share the updates.
    """

    def __init__(
        self,
        state: AgentState,
        example: Observation,
        *,
        config: Config,
        run_dir: Path,
        say: Callable[[str], None],
        recorded: Sequence[Episode] = (),
        processes: Processes | None = None,
    ):
        self.replay = Replay(config, longest=max(map(len, recorded), default=0))
        self.updates = int(state.step)
        self._config, self._example = config, example
        self._run_dir = run_dir
        self._say = say
        self._refused = 0  # consecutive non-finite updates
        self._waiting = False  # whether the lack of a usable episode was reported
        self._under_way: _Dispatch | None = None
        self._processes = processes or Processes()
        self._compiled = False  # in all processes
        self.devices = sharing(config)
        self._split: NamedSharding | None
        whole, self._split = shardings(config.learn.batch_size, self.devices) or (None, None)
        # A single device is named too, as in a loaded state, or the update compiles for each.
        if whole is None:
            self.state = jax.device_put(state, jax.local_devices()[0])
        else:
            self.state = replicate(state, whole)
        lengths = [len(episode) for episode in recorded]
        self.placement = place(example, config, lengths)
        self._store: Store | None = None
        if self.placement == "device":
            shapes = store_shapes(example, config, lengths)
            self._store = jax.jit(
                lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
                out_shardings=whole,
            )()
        for episode in recorded:
            self._put(self.replay.give, episode)

    @property
    def local(self) -> AgentState:
        """The state on devices of this process alone; an update donates it too."""
        return _local(self.state) if self._processes.several else self.state

    @contextlib.contextmanager
    def planning(self) -> Iterator[Params]:
        """Context in which this process's devices share a plan's candidates; yields parameters."""
        params = self.local.acting
        if jax.local_device_count() == 1:
            yield params
            return
        mesh = Mesh(np.array(jax.local_devices()), ("devices",))
        with jax.set_mesh(mesh):
            yield jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

    def snapshot(self) -> Params:
        """A copy of the parameters on one device, which outlasts the updates that donate them."""
        return jax.device_put(jax.tree.map(jnp.copy, self.local.acting), jax.local_devices()[0])

    def add(self, episode: Episode) -> None:
        """Add a new episode, in all processes."""
        if self._processes.leads:
            self._processes.tell("episode", npz.pack_episode(episode))
        self._processes.progress()
        self.restore(episode)
        if trains_encoder(self._config):
            self.state = observe(self.state, episode.observations.vector)

    def follow(self, interrupt: Callable[[], None]) -> None:
        """Do as the first process says until it ends; ``interrupt`` raises if a signal came.

        Raises:
            cli.Interrupted: if the first stops because of a signal to any process.
            StoppedError: if the first fails, or this learner differs from its.
        """
        while (word := self._processes.receive(interrupt)).kind != "end":
            if word.kind == "episode":
                self.add(npz.unpack_episode(word.body, self._example, self._config))
                continue
            if int(word.body) != self.updates:
                raise StoppedError(
                    f"process {self._processes.rank} has made {self.updates} updates, process 0 "
                    f"{int(word.body)}"
                )
            self._dispatch(1, [])
        self._judge([])

    def restore(self, episode: Episode) -> None:
        """Add an episode that the normaliser has already seen."""
        self._put(self.replay.add, episode)

    def _put(self, add: Callable[[Episode], int], episode: Episode) -> None:
        episode = prepared(episode, config=self._config)
        slot = add(episode)
        if self._store is None:
            return
        try:
            self._store = store_episode(self._store, slot, episode)
        except UsageError as error:  # a custom environment may have its own limit
            if self._config.replay.placement == "device":
                raise
            self._say(f"note: {error}; segments are gathered on the host")
            self._store, self.placement = None, "host"

    def check(self) -> None:
        """Raise StoppedError if the agent cannot be saved."""
        leaves = jax.tree.leaves(self.state)
        if any(leaf.is_deleted() for leaf in leaves):
            raise StoppedError("the agent was lost in an update that failed")
        floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
        try:
            on_host = jax.device_get(floats)
        except RuntimeError as error:  # as when another process was lost in it
            raise StoppedError("the agent was lost in an update that failed") from error
        if not all(np.isfinite(leaf).all() for leaf in on_host):
            raise StoppedError("the agent's parameters are not finite")

    def learn(
        self,
        due: int,
        metrics: list[dict[str, float]],
        interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        """Make updates until there have been ``due``.

        Args:
            due: updates since the run began.
            metrics: each update's are appended.
            interrupt: called before every dispatch; an exception ends the learning.

        Raises:
            StoppedError: after too many consecutive non-finite updates.
        """
        if not self.replay.ready:
            if due and not self._waiting:
                self._waiting = True
                self._say(
                    "warning: no episode so far is as long as a training segment "
                    f"({self._config.segment_steps} steps): nothing can be learnt"
                )
            return
        try:
            while self.updates < due:
                interrupt()
                self._dispatch(due - self.updates, metrics)
        finally:
            self._judge(metrics)

    def _dispatch(self, most: int, metrics: list[dict[str, float]]) -> None:
        """Start the next updates, after checking the previous ones."""
        config, first = self._config, self.updates
        told = self._processes.tell("update", str(first))
        size = 1 if self._store is None else config.learn.updates_per_dispatch
        count = min(most, size)
        segments = [
            self.replay.draw(
                np.random.default_rng([2, config.seed, first + i]), config.learn.batch_size
            )
            for i in range(count)
        ]
        batch = None
        if self._processes.several:
            rows = self._gather_rows(segments[0])
            self._judge(metrics)
            if not self._compiled:  # before any waits for another, as devices do so for seconds
                compile_update(self.state, rows, config=config)
                self._processes.meet("compiled")
                self._compiled = True
            with self._processes.updating():
                self.state, values = update(self.state, rows, config=config)
        elif self._store is None:
            batch = self.replay.gather(segments[0])
            # Gathering overlaps with the device's work, but only one batch ahead.
            self._judge(metrics)
            if self._split is not None:
                batch = jax.device_put(batch, self._split)
            self.state, values = update(self.state, batch, config=config)
        else:
            padded = segments + [segments[0]] * (size - count)  # one shape compiles once
            stacked = jax.tree.map(lambda *x: np.stack(x), *padded)
            self._judge(metrics)
            if self._split is not None:
                split = NamedSharding(self._split.mesh, PartitionSpec(None, *self._split.spec))
                stacked = jax.device_put(stacked, split)
            self.state, values = update_from_store(
                self.state, self._store, stacked, np.int32(count), config=config
            )
        self.updates += count
        self._under_way = _Dispatch(first, segments, batch, values, told)

    def _gather_rows(self, segments: Segments) -> Batch:
        """A batch over all processes, each of which gathers its own rows."""
        processes, split = self._processes, self._split
        assert split is not None
        count = self._config.learn.batch_size // processes.count
        own = slice(processes.rank * count, (processes.rank + 1) * count)
        batch = self.replay.gather(jax.tree.map(lambda x: x[own], segments))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), batch)

    def _judge(self, metrics: list[dict[str, float]]) -> None:
        """Wait for the dispatched updates, and save the batches of those that were refused.

        Raises:
            StoppedError: after too many consecutive refusals.
        """
        done, self._under_way = self._under_way, None
        if done is None:
            return
        with self._processes.updating():
            values = {name: np.atleast_1d(value) for name, value in done.values.items()}
        self._processes.forget(done.told)
        for i, segments in enumerate(done.segments):
            one = {name: float(value[i]) for name, value in values.items()}
            metrics.append(one)
            self._refused = self._refused + 1 if one["update/refused"] else 0
            if self._refused and self._processes.follows:  # the first keeps the batch
                self._stop_at_limit(_refusal(done.first + i + 1, one))
            elif self._refused:
                batch = self.replay.gather(segments) if done.batch is None else done.batch
                self._report_refusal(done.first + i + 1, batch, one)

    def _report_refusal(self, number: int, batch: Batch, values: dict[str, float]) -> None:
        limit = self._config.learn.nonfinite_limit
        sentence = _refusal(number, values)
        try:
            path = npz.save_batch(self._run_dir, number, batch)
            sentence += f"; its batch is in {path}"
            for old in sorted(path.parent.glob("*.npz"))[:-limit]:
                old.unlink()
        except OSError as error:
            sentence += f"; its batch cannot be kept: {error.strerror}"
        self._say(f"warning: {sentence}")
        self._stop_at_limit(sentence)

    def _stop_at_limit(self, sentence: str) -> None:
        limit = self._config.learn.nonfinite_limit
        if self._refused >= limit:
            raise StoppedError(f"{limit} updates in a row were not finite: {sentence}")


def _refusal(number: int, values: dict[str, float]) -> str:
    names = ", ".join(name for name, value in values.items() if not np.isfinite(value))
    return f"{names} not finite in update {number}, which was refused"


class _Dispatch(NamedTuple):
    """Updates dispatched to the device."""

    first: int  # updates made before them
    segments: list[Segments]  # of each
    batch: Batch | None  # of the only one, if gathered on the host
    values: dict[str, Array]  # their metrics
    told: int  # number of the word on them to other processes


def _local(tree: Any) -> Any:
    """Replicated arrays on one device of this process, without a copy."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def check_names(config: Config) -> None:
    """Check that every name in a configuration is known.

    Raises:
        UsageError: naming the option.
    """
    named: tuple[tuple[Registry[Any], str], ...] = (
        (SOURCES, config.collect.source),
        (DYNAMICS, config.model.dynamics),
        (PLANNERS, config.planner.kind),
        *((NETWORKS, name) for name in config.model.networks),
        *((TERMS, name) for name in config.learn.terms),
    )
    for registry, name in named:
        registry[name]  # raises
    networks = set(config.model.networks)
    if not config.diffuses_plans:
        networks |= {"encoder", "dynamics", "reward"}
        networks |= set() if "q" in networks else {"value"}
    for name in config.learn.terms:
        for network in (*TERMS[name].trains, *TERMS[name].needs):
            if network not in networks:
                raise UsageError(f"--learn.terms: {name} needs --model.networks {network}")


def check(example: Observation, config: Config) -> None:
    """Check a configuration before anything is made for it.

    Raises:
        UsageError: as `Learner`, or if the configuration holds an unknown name.
    """
    check_names(config)
    goal = config.model.prior.goal
    if goal and (example.image is not None or example.vector.shape[-1] < 2 * goal):
        raise UsageError(
            f"--model.prior.goal is {goal}; it is for vector observations that hold a goal"
        )
    sees = example.image is not None
    if config.learn.random_shift and not sees:
        raise UsageError("--learn.random-shift is for images, and this environment has none")
    if config.learn.mirror and (not sees or config.model.action_dim != 3):
        raise UsageError("--learn.mirror is for carracing alone: it exchanges its left and right")
    place(example, config)
    shardings(config.learn.batch_size, sharing(config))


def sharing(config: Config) -> int:
    """Number of devices that share an update.

    As many as requested; else one of each process on a CPU, or as many accelerators as split the
    batch evenly, equally many of each process.
    """
    processes = jax.process_count()
    if config.learn.devices or jax.default_backend() == "cpu":
        return config.learn.devices or processes
    divisors = range(processes, jax.device_count() + 1, processes)
    return max((n for n in divisors if config.learn.batch_size % n == 0), default=processes)


def place(example: Observation, config: Config, recorded: Sequence[int] = ()) -> str:
    """Where a run's segments, of recorded episodes of these lengths too, are gathered.

    Returns: ``"device"`` or ``"host"``.

    Raises:
        UsageError: if the device is requested, and the episodes have no known limit or several
            processes learn.
    """
    asked = config.replay.placement
    if jax.process_count() > 1:
        if asked == "device":
            raise UsageError(
                "--replay.placement device is for one process; several gather on the host"
            )
        return "host"
    if asked == "device":
        store_shapes(example, config, recorded)  # raises
    if asked != "auto":
        return asked
    if jax.default_backend() == "cpu":  # where a loop only slows updates down
        return "host"
    try:
        shapes = jax.tree.leaves(store_shapes(example, config, recorded))
    except UsageError:
        return "host"
    needed = sum(x.size * x.dtype.itemsize for x in shapes)
    memory = jax.local_devices()[0].memory_stats() or {}
    free = memory.get("bytes_limit", 0) - memory.get("bytes_in_use", 0)
    return "device" if needed <= _STORE_SHARE * free else "host"
