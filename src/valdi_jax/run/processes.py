"""Several processes that learn one agent: what the first tells the others, and their end.

The first process does all that one process does. It tells the others, in order, which episodes to
add and which updates to make; these wait for its word, so that all do the same. Words go through
the key-value store of JAX's coordination service; only updates communicate between devices.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import jax
from jax._src import distributed  # for the key-value store, as Orbax does: it has no other name

from valdi_jax import cli
from valdi_jax.config import LearnConfig
from valdi_jax.errors import StoppedError, UsageError

_PART = 1 << 20  # bytes of a value in the store
_POLL_MS = 200  # between two looks at whether to stop, while waiting for a word
_LISTEN = 0.5  # seconds between two looks at what other processes say of themselves
_GRACE = 10.0  # seconds that an update may take once another process has failed
_LEAVING = 10  # seconds that a process waits for the others to leave

_runs = itertools.count()  # the same in all processes: each run has words of its own
_joined = threading.Event()  # whether `start` has joined the processes


class Word(NamedTuple):
    """What the first process tells the others."""

    kind: str
    body: bytes = b""


def start(learn: LearnConfig) -> None:
    """Join the other processes, if there are to be several. Nothing may have used a device before.

    A program that has called `jax.distributed.initialize` itself is left as it is.

    Raises:
        UsageError: if they cannot be found, or are not as many as asked for.
    """
    if jax.distributed.is_initialized():
        if learn.processes > 1 and learn.processes != jax.process_count():
            raise UsageError(
                f"--learn.processes is {learn.processes}; there are {jax.process_count()}"
            )
        return
    if learn.processes == 1:
        return
    # It would take SIGTERM, which here stops all processes as other signals do.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *(learn.coordinator or None, learn.processes or None),
            learn.rank if learn.rank >= 0 else None,
            coordinator_bind_address=_binding(learn.coordinator),
            heartbeat_timeout_seconds=learn.heartbeat,
            shutdown_timeout_seconds=_LEAVING,
        )
    except (ValueError, RuntimeError) as error:
        hint = "--learn.coordinator HOST:PORT and --learn.rank say what JAX cannot find out"
        reason = _first_line(error) + (f" ({hint})" if type(error) is ValueError else "")
        raise UsageError(f"--learn.processes {learn.processes}: {reason}") from error
    _joined.set()


def _leave() -> None:
    """Part from the other processes; what a program does afterwards is its own affair."""
    if _joined.is_set():
        _joined.clear()
        with contextlib.suppress(RuntimeError):  # another was lost
            jax.distributed.shutdown()


def _binding(coordinator: str) -> str | None:
    """Where the first process listens; None for what JAX takes."""
    host, _, port = coordinator.rpartition(":")
    if "JAX_COORDINATOR_BIND_ADDRESS" in os.environ or not host:
        return None
    if host in ("localhost", "127.0.0.1", "[::1]"):
        return coordinator  # and nowhere else
    return f"{'[::]' if socket.has_dualstack_ipv6() else '0.0.0.0'}:{port}"


def _leave_at_once() -> None:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(3)


class Processes:
    """The processes of a run, as a context; alone, everything here does nothing.

    When it ends in the first process, `receive` returns in the others with the word ``end``, or
    raises what ended the first. When it ends in another by an exception, `check` raises in the
    first.

    Args:
        watchdog: seconds without `progress` after which this process ends with status 3; 0 for any
            time.

    Attributes:
        count: how many there are.
        rank: which one this is.
        several: whether there are others.
        leads: whether others do as this one says.
        follows: whether this one does as another says.
    """

    def __init__(self, watchdog: int = 0):
        self.count, self.rank = jax.process_count(), jax.process_index()
        self.several = self.count > 1
        self.leads, self.follows = self.several and not self.rank, self.rank > 0
        self._limit = watchdog
        self._next = 0  # number of the next word
        self._kept = 0  # number of the oldest word that is still in the store
        self._told: int | None = None  # the signal that others know of
        self._ended = False  # whether the first process has said so
        self._heard: dict[int, str] = {}  # what others say of themselves, by rank
        self._failed: float | None = None  # when another was heard to have failed
        self._updating = False
        self._lost = False  # whether another process is gone
        self._moved = time.monotonic()
        self._over = threading.Event()

    def __enter__(self) -> Processes:
        if self.several:
            self._name = f"valdi/{next(_runs)}"
            for work in (self._listen, self._watch):
                threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self.several:
            return
        with contextlib.suppress(RuntimeError):  # the store may be gone with its process
            if error is None:
                self.tell("end")
            elif self.leads and isinstance(error, cli.Interrupted):
                self.tell("stop", str(error.signum))
            elif not self._ended:
                self._say(f"failed {_sentence(error)}")  # to those that wait in an update
                self.tell("fail", _sentence(error))
                if self.follows:
                    self._await_end()  # the first process saves before this one leaves
        self._over.set()
        if self._lost:
            # JAX would wait for it, and then abort.
            atexit.register(_leave_at_once)
        else:
            _leave()

    def tell(self, kind: str, body: bytes | str = b"") -> int:
        """Tell the others, if this is the first process; returns the word's number."""
        if not self.leads:
            return 0
        body = body.encode() if isinstance(body, str) else body
        number, self._next = self._next, self._next + 1
        parts = [body[i : i + _PART] for i in range(0, len(body), _PART)]
        for i, part in enumerate(parts):
            _client().key_value_set_bytes(f"{self._name}/{number}/{i}", part)
        # Last, as this is what the others wait for.
        _client().key_value_set_bytes(f"{self._name}/{number}", f"{kind} {len(parts)}".encode())
        return number

    def forget(self, number: int) -> None:
        """Delete the words up to a number, which all have heard."""
        while self.leads and self._kept <= number:
            _client().key_value_delete(f"{self._name}/{self._kept}")  # with its parts
            self._kept += 1

    def receive(self, interrupt: Callable[[], None]) -> Word:
        """The next word of the first process; a signal to this one is passed on to all.

        Raises:
            StoppedError: if the first process has failed.
            cli.Interrupted: if it stops because of a signal to any process.
        """
        while True:
            self._pass_on(interrupt)
            try:
                word = self._read(_POLL_MS)
                break
            except TimeoutError:
                pass
            except RuntimeError as error:
                self._lost = True
                raise StoppedError(f"process 0 cannot be reached: {_first_line(error)}") from error
        self.progress()
        self._ended = word.kind in ("stop", "fail", "end")
        if word.kind == "stop":
            raise cli.Interrupted(int(word.body))
        if word.kind == "fail":
            raise StoppedError(f"process 0 has ended: {word.body.decode()}")
        return word

    def check(self) -> None:
        """Raise what another process wants: to stop for a signal, or because it has failed.

        Raises:
            cli.Interrupted: if another got a signal.
            StoppedError: if another failed.
        """
        self._check_failed()
        for said in list(self._heard.values()):
            if said.startswith("signal "):
                raise cli.Interrupted(int(said.removeprefix("signal ")))

    def _check_failed(self) -> None:
        if failure := self._failure():
            raise StoppedError(failure)

    def _failure(self) -> str:
        """What another process failed with, if one has."""
        for rank, said in list(self._heard.items()):
            if said.startswith("failed "):
                return f"process {rank} has ended: {said.removeprefix('failed ')}"
        return ""

    def meet(self, name: str) -> None:
        """Wait until all processes are here; a signal waits for the next `check`.

        Raises:
            StoppedError: if another failed.
        """
        if not self.several:
            return
        _client().key_value_set(f"{self._name}/{name}/{self.rank}", "here")
        for rank in range(self.count):
            while True:
                self._check_failed()
                with contextlib.suppress(TimeoutError):
                    _get(f"{self._name}/{name}/{rank}", _POLL_MS)
                    break
        self.progress()

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Context that waits for devices of other processes.

        Raises:
            StoppedError: if one of these was lost.
        """
        if not self.several:
            yield
            return
        self._updating = True
        try:
            yield
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):  # this process's own
                raise
            time.sleep(2 * _LISTEN)  # the other may be about to say why
            self._check_failed()
            self._lost = True
            raise StoppedError(
                f"an update failed, as if another process was lost: {_first_line(error)}"
            ) from error
        finally:
            self._updating = False
        self.progress()

    def progress(self) -> None:
        """There was an update or a new episode."""
        self._moved = time.monotonic()

    def _pass_on(self, interrupt: Callable[[], None]) -> None:
        try:
            interrupt()
        except cli.Interrupted as signal:
            if self._told is None:
                self._told = signal.signum
                self._say(f"signal {signal.signum}")

    def _await_end(self) -> None:
        while not self._ended:
            with contextlib.suppress(TimeoutError):
                self._ended = self._read(_POLL_MS).kind in ("stop", "fail", "end")

    def _read(self, timeout_ms: int) -> Word:
        """Raises TimeoutError if there is none yet."""
        name = f"{self._name}/{self._next}"
        kind, count = _get(name, timeout_ms).decode().split()
        body = b"".join(_get(f"{name}/{i}", 60_000) for i in range(int(count)))
        self._next += 1
        return Word(kind, body)

    def _say(self, what: str) -> None:
        """Say something of this process."""
        name = f"{self._name}/said/{self.rank}"
        _client().key_value_set(name, what[:1000], allow_overwrite=True)

    def _listen(self) -> None:
        while not self._over.wait(_LISTEN):
            try:
                said = _client().key_value_dir_get(f"{self._name}/said/")
            except RuntimeError:  # the store is gone with its process: JAX ends this one
                continue
            for name, what in said:
                rank = int(name.rpartition("/")[2])
                if rank != self.rank:
                    self._heard[rank] = what
                    if what.startswith("failed") and self._failed is None:
                        self._failed = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(1):
            now = time.monotonic()
            if self._limit and now - self._moved > self._limit:
                self._exit(
                    f"no update and no new episode for {self._limit} s (--learn.watchdog): this "
                    "process or another hangs"
                )
            if self._failed is not None and self._updating and now - self._failed > _GRACE:
                self._exit(self._failure())

    def _exit(self, sentence: str) -> None:
        """End this process, whose main thread waits for ever."""
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # show the cursor, which a live display hides
        print(f"stopped: {sentence}", file=sys.stderr, flush=True)
        os._exit(3)


def _client() -> Any:
    return distributed.global_state.client


def _get(name: str, timeout_ms: int) -> bytes:
    try:
        return _client().blocking_key_value_get_bytes(name, timeout_ms)
    except RuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            raise TimeoutError(name) from None
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _sentence(error: BaseException) -> str:
    if isinstance(error, (StoppedError, UsageError)):
        return str(error)
    return f"{type(error).__name__}: {_first_line(error)}"
