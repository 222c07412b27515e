"""Shared by the commands: parsing, one-sentence errors, clean interruption."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import tyro

from valdi_jax.errors import StoppedError, UsageError

T = TypeVar("T")


def parse(cls: type[T], argv: Sequence[str], *, default: T | None = None, **settings: Any) -> T:
    """Parse a command line into a dataclass.

    Raises:
        UsageError: one sentence; it suggests the nearest option for a misspelt one.
        SystemExit: after printing ``--help``.
    """
    if default is not None:
        settings["default"] = default
    output = io.StringIO()
    wants_help = "-h" in argv or "--help" in argv
    try:
        with contextlib.nullcontext() if wants_help else contextlib.redirect_stderr(output):
            return tyro.cli(cls, args=list(argv), compact_help=False, **settings)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(_sentence(output.getvalue())) from None


def _sentence(message: str) -> str:
    """Tyro's boxed error message as one sentence."""
    lines = [line.strip("│╭╮╰╯─ \n") for line in message.splitlines()]
    unknown = re.search(r"Unrecognized options: (--[^\s,=]+)", message)
    if unknown:
        near = next((line.split()[0] for line in lines if line.startswith("--")), None)
        hint = f"did you mean {near}?" if near else "--help lists them all"
        return f"unknown option {unknown[1]}: {hint}"
    paragraph = itertools.takewhile(bool, lines[1:])  # rules between paragraphs are empty by now
    return " ".join(paragraph) or "cannot read the command line"


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Run a command; `UsageError` exits with status 2, `StoppedError` with 3."""
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except StoppedError as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(3)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader closed the pipe, as in `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_REPEAT = 0.5  # seconds in which `timeout` and shells may send the same signal twice
_STOPPING = (
    "stopping after the step under way (the first ones compile for a while); "
    "a second signal exits at once, and what is not saved yet is lost"
)


def _say_stopping() -> None:
    with contextlib.suppress(BaseException):  # the terminal may be gone
        print(_STOPPING, file=sys.stderr, flush=True)  # above a live display


class Interrupted(Exception):
    """A signal to stop was received; raised where the work can stop."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Turn signals to stop into `Interrupted` at the next call of the yielded function.

    These are SIGINT, SIGTERM, SIGHUP, and SIGUSR1, by which Slurm announces the end of a job. A
    second signal ends the process at once. Outside the main thread, where Python allows no signal
    handlers, the function does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    received: list[int] = []

    def handle(signum, frame):
        received.append(signum)

    def check() -> None:
        if received:
            raise Interrupted(received[0])

    # A handler waits for the interpreter, which an environment may block forever; this pipe gets
    # the signal's number without it.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        first = None
        while numbers := os.read(reading, 16):
            if not any(number in _SIGNALS for number in numbers):
                continue
            if first is None:
                first = time.monotonic()
                # In a thread of its own: whoever reads the output may have stalled.
                threading.Thread(target=_say_stopping, daemon=True).start()
            elif time.monotonic() - first > _REPEAT:
                if os.isatty(1):
                    os.write(1, b"\x1b[?25h")  # show the cursor, which a live display hides
                os._exit(130)
        os.close(reading)

    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # What was ignored stays ignored, as under nohup.
    heard = [s for s in _SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
    previous = {s: signal.signal(s, handle) for s in heard}

    def restore() -> None:
        signal.set_wakeup_fd(before)
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    _in_children.append(restore)
    try:
        yield check
    finally:
        _in_children.remove(restore)
        restore()
        os.close(writing)


def _forget_in_child() -> None:
    """A forked child's signals are its own affair: they must not count as the parent's."""
    while _in_children:
        _in_children.pop()()


_in_children: list[Callable[[], None]] = []
os.register_at_fork(after_in_child=_forget_in_child)
