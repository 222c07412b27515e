"""Collecting with Ray (extra ray): actors on any machines drive the episodes.

Ray executes what it is sent: keep its ports in a private network (docs/scale.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import queue
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax import compilation
from valdi_jax.config import CollectConfig
from valdi_jax.data.collector import Drive, Interrupt, Ticket, waiting_for
from valdi_jax.data.rollout import Job, Rollout
from valdi_jax.errors import StoppedError, UsageError
from valdi_jax.types import Params

try:
    import ray
    from ray.exceptions import RayActorError, RayError, RayTaskError
except ImportError as error:
    raise UsageError("--collect.cluster needs Ray: pip install 'valdi-jax[ray]'") from error

_LOSSES = 5  # lost actors, after which an episode is given up
_POLL = 0.2  # seconds between two looks at whether the work is to stop
_REACHABLE = 10.0  # seconds in which a cluster must answer
_LOOPBACK = "127.0.0.2"  # Ray rewrites 127.0.0.1 as a name, and its head then hangs


class RayCollector:
    """Drives episodes in Ray actors, each with environments of its own.

    A thread waits for each actor. One that is lost is replaced as soon as there is room, and others
    drive its episodes again; as these follow from parameters, seeds and keys alone, the run stays
    the same.

    Args:
        collect: the run's configuration; its ``cluster`` is an address, or ``local``. A program
            that is connected to a cluster already stays with that.
        make_drive: called in each actor, makes what drives its episodes; must be picklable.

    Attributes:
        lost: actors lost so far.

    Raises:
        UsageError: if Ray is not installed, or the cluster cannot be reached or is too small.
    """

    def __init__(self, collect: CollectConfig, make_drive: Callable[[], Drive]):
        self.lost = 0
        self._ours = not ray.is_initialized()
        if self._ours:
            _connect(collect.cluster, collect.actors)
        if (places := int(ray.cluster_resources().get("CPU", 0))) < collect.actors:
            if self._ours:
                ray.shutdown()
            raise UsageError(
                f"--collect.actors is {collect.actors}; the cluster has {places} CPUs, one for each"
            )
        self._spawn: Callable[[], Any] = functools.partial(
            ray.remote(_Actor).options(num_cpus=1, scheduling_strategy="SPREAD").remote,
            *(make_drive, jax.config.values["jax_compilation_cache_dir"] is not None),
        )
        self._size = collect.num_envs
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()  # actors that have answered
        self._failure = ""  # why an actor cannot start
        self._over = threading.Event()
        self._counting = threading.Lock()
        self._sent: tuple[Params, Any] | None = None  # the last parameters, and where they are
        self._hiring: list[threading.Thread] = []
        for _ in range(collect.actors):
            self._hire()
        self._executor = ThreadPoolExecutor(collect.actors, "collect")

    def submit(self, params: Params, version: int, jobs: Sequence[Job], noise_std: float) -> Ticket:
        """See `Collector`; an actor takes as many episodes at once as it has environments."""
        if self._sent is None or self._sent[0] is not params:
            # Once for all actors of a node.
            self._sent = params, ray.put(jax.device_get(params))
        sent = [_Sent(job.seed, np.asarray(jax.random.key_data(job.key))) for job in jobs]
        parts = [sent[i : i + self._size] for i in range(0, len(sent), self._size)]
        futures = [
            self._executor.submit(self._drive, self._sent[1], part, noise_std) for part in parts
        ]
        return Ticket(version, [waiting_for(future) for future in futures])

    def result(self, ticket: Ticket, on_wait: Interrupt) -> list[Rollout]:
        """See `Collector`."""
        return [rollout for part in ticket.parts for rollout in part(on_wait)]

    def close(self) -> None:
        """See `Collector`."""
        self._over.set()
        self._executor.shutdown(cancel_futures=True)
        for thread in self._hiring:
            thread.join()
        with contextlib.suppress(RayError, RuntimeError):  # the cluster may be gone
            while not self._idle.empty():
                ray.kill(self._idle.get())
            if self._ours:
                ray.shutdown()

    def _hire(self) -> None:
        """Start an actor; it counts among the idle ones once it answers."""

        def start() -> None:
            while not self._over.is_set():
                actor = self._spawn()
                try:
                    if self._answer(actor.ready.remote()):
                        self._idle.put(actor)
                    return
                except StoppedError:
                    ray.kill(actor)
                except RayActorError as error:
                    if error.actor_init_failed:
                        self._failure = f"a collector cannot start:\n{error}"
                        return
                except RayError as error:
                    self._failure = f"a collector cannot start:\n{error}"
                    return

        thread = threading.Thread(target=start, name="hire", daemon=True)
        self._hiring.append(thread)
        thread.start()

    def _answer(self, work: Any) -> Any:
        """The result of an actor's work.

        Raises:
            StoppedError: if the collector is closed.
        """
        while not ray.wait([work], timeout=_POLL)[0]:
            if self._over.is_set():
                raise StoppedError("collecting has stopped")
        return ray.get(work)

    def _next_idle(self) -> Any:
        while True:
            with contextlib.suppress(queue.Empty):
                return self._idle.get(timeout=_POLL)
            if self._over.is_set():
                raise StoppedError("collecting has stopped")
            if self._failure:
                raise RuntimeError(self._failure)

    def _drive(self, params: Any, jobs: Sequence[_Sent], noise_std: float) -> list[Rollout]:
        """Have an idle actor drive these episodes, and another if it is lost."""
        reason: RayError
        for _ in range(_LOSSES):
            actor = self._next_idle()
            try:
                rollouts = self._answer(actor.drive.remote(params, jobs, noise_std))
                self._idle.put(actor)
                return [_owned(rollout) for rollout in rollouts]
            except (RayTaskError, StoppedError) as error:
                self._idle.put(actor)
                if isinstance(error, StoppedError):
                    raise
                if isinstance(error.cause, (StoppedError, UsageError)):
                    raise type(error.cause)(str(error.cause)) from None
                raise RuntimeError(f"a collector failed:\n{error}") from None
            except RayError as error:  # its process, its machine, or what it sent is gone
                reason = error
                with self._counting:
                    self.lost += 1
                with contextlib.suppress(RayError):
                    ray.kill(actor)
                self._hire()
        seeds = ", ".join(str(job.seed) for job in jobs)
        raise StoppedError(
            f"the episodes with the seeds {seeds} lost their collector {_LOSSES} times: {reason}"
        )


class _Sent(NamedTuple):
    """A job without a JAX array."""

    seed: int
    key: np.ndarray


class _Actor:
    """Environments and a planner in a process of their own."""

    def __init__(self, make_drive: Callable[[], Drive], cached: bool):
        jax.config.update("jax_platforms", "cpu")
        if cached:
            compilation.cache_compilations()
        self._drive = make_drive()

    def ready(self) -> bool:
        """Whether it has started, once it answers at all."""
        return True

    def drive(self, params: Params, jobs: Sequence[_Sent], noise_std: float) -> list[Rollout]:
        # Copies: what Ray passes is a view of its memory, which JAX may alias.
        params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
        keyed = [Job(seed, jax.random.wrap_key_data(jnp.array(key))) for seed, key in jobs]
        return self._drive(params, keyed, noise_std, lambda: None)


def _owned(rollout: Rollout) -> Rollout:
    """A copy that does not view Ray's memory, which would then stay taken."""
    episode = rollout.episode
    copied = dataclasses.replace(
        episode,
        observations=jax.tree.map(np.array, episode.observations),
        actions=np.array(episode.actions),
        rewards=np.array(episode.rewards),
    )
    return dataclasses.replace(
        rollout,
        episode=copied,
        plan_seconds=np.array(rollout.plan_seconds),
        env_seconds=np.array(rollout.env_seconds),
    )


def _connect(address: str, actors: int) -> None:
    """Connect to a cluster, or start one in this machine.

    Raises:
        UsageError: if it cannot be reached.
    """
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address == "local":
        settings |= {"num_cpus": actors, "include_dashboard": False}
        settings |= {"address": "local", "_node_ip_address": _LOOPBACK}
    else:
        settings["address"] = address
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), timeout=_REACHABLE).close()
        with _own_handlers():
            ray.init(**settings)
    except (ConnectionError, OSError, ValueError, RuntimeError, RayError) as error:
        raise UsageError(f"--collect.cluster {address}: {error}") from error


@contextlib.contextmanager
def _own_handlers() -> Iterator[None]:
    """Context after which this process handles signals as before: Ray replaces SIGTERM's.

    Processes that Ray starts in it ignore SIGHUP and SIGUSR1, which reach a whole group but are
    meant for this one.
    """
    ignored = signal.SIGHUP, signal.SIGUSR1
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, *ignored)}
    try:
        if threading.current_thread() is threading.main_thread():
            for signum in ignored:
                signal.signal(signum, signal.SIG_IGN)
        with warnings.catch_warnings():  # of a fork, though Ray's processes begin anew
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for signum, handler in before.items():
                signal.signal(signum, handler)
