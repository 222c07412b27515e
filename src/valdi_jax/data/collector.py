"""Collectors: who drives the episodes of a run, and where."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from valdi_jax.data.rollout import Job, Rollout
from valdi_jax.errors import StoppedError
from valdi_jax.types import Params

Interrupt = Callable[[], None]  # raises if the work is to stop
Drive = Callable[[Params, Sequence[Job], float, Interrupt], list[Rollout]]  # with that noise

_POLL = 0.05  # seconds between two calls of on_wait


@dataclasses.dataclass(frozen=True)
class Round:
    """Episodes that are collected with the same parameters."""

    numbers: range
    version: int  # updates behind the parameters
    params: Params


@dataclasses.dataclass(frozen=True)
class Ticket:
    """Episodes under way.

    Attributes:
        version: updates behind the parameters that they plan with.
        parts: their parts in the order of the jobs; each waits for its episodes.
    """

    version: int
    parts: Sequence[Callable[[Interrupt], list[Rollout]]]


class Collector(Protocol):
    """Drives episodes; each follows from its parameters, job and noise alone, wherever it is.

    Attributes:
        lost: processes lost so far, whose episodes others drove again.
    """

    lost: int

    def submit(self, params: Params, version: int, jobs: Sequence[Job], noise_std: float) -> Ticket:
        """Start these episodes; ``version`` is the number of updates behind ``params``."""

    def result(self, ticket: Ticket, on_wait: Interrupt) -> list[Rollout]:
        """The episodes in the order of their jobs; ``on_wait`` is called while they are driven.

        Raises:
            StoppedError: if an episode is lost too often.
        """

    def close(self) -> None:
        """Stop the episodes under way and release all resources."""


class LocalCollector:
    """Drives in this process: within `result`, or beside the caller in a thread.

    Args:
        drive: drives episodes, one round at a time.
        beside: whether they are driven in a thread.
    """

    lost = 0  # a pool replaces its own workers

    def __init__(self, drive: Drive, *, beside: bool = False):
        self._drive = drive
        self._over = threading.Event()
        self._executor = ThreadPoolExecutor(1, "collect") if beside else None

    def submit(self, params: Params, version: int, jobs: Sequence[Job], noise_std: float) -> Ticket:
        """See `Collector`."""
        work = functools.partial(self._drive, params, jobs, noise_std)
        if self._executor is None:
            return Ticket(version, [work])
        return Ticket(version, [waiting_for(self._executor.submit(work, self._check))])

    def result(self, ticket: Ticket, on_wait: Interrupt) -> list[Rollout]:
        """See `Collector`."""
        return [rollout for part in ticket.parts for rollout in part(on_wait)]

    def close(self) -> None:
        """See `Collector`."""
        self._over.set()
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def _check(self) -> None:
        if self._over.is_set():
            raise StoppedError("collecting has stopped")


def waiting_for(future: Future[list[Rollout]]) -> Callable[[Interrupt], list[Rollout]]:
    """A ticket's part that is driven elsewhere."""

    def wait(on_wait: Interrupt) -> list[Rollout]:
        while not concurrent.futures.wait([future], timeout=_POLL).done:
            on_wait()
        return future.result()

    return wait


@contextlib.contextmanager
def holding(lock: threading.Lock, on_wait: Interrupt) -> Iterator[None]:
    """Context that holds a lock; ``on_wait`` is called while another has it."""
    while not lock.acquire(timeout=_POLL):
        on_wait()
    try:
        yield
    finally:
        lock.release()
