"""Logs of a run: metrics.jsonl, evaluations.jsonl and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from valdi_jax.errors import UsageError
from valdi_jax.run.manifest import write_atomic

_BY_STEP = ("episode/return", "eval/return")  # in TensorBoard also over environment steps


class RunLog:
    """Appends to ``metrics.jsonl`` and ``evaluations.jsonl``, and to TensorBoard.

    Each line is on disk when the call returns; one that cannot be written is kept and written with
    the next. On opening, records beyond ``episodes`` are dropped: a run resumed from an older
    checkpoint collects those again. If a line cannot be read, the others are kept, and the original
    file becomes ``damaged-NAME``. Such problems are passed to ``say``.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        episodes: int,
        env_steps: int = 0,
        options: dict[str, Any] | None = None,
        say: Callable[[str], None] = print,
    ):
        self._say = say
        self._files = {}
        for name in ("metrics", "evaluations"):
            path = run_dir / f"{name}.jsonl"
            _trim(path, episodes, say)
            self._files[name] = _Lines(path)
        # A resumed run purges by position, so that each axis needs its own files.
        self._tensorboard = (
            _TensorBoard(run_dir, "episode", episodes, options or {}),
            # The last round ends at just this many steps, and stays.
            _TensorBoard(run_dir / "env_steps", "total/env_steps", env_steps and env_steps + 1, {}),
        )

    def episode(self, record: dict[str, Any]) -> None:
        self._write("metrics", record)

    def evaluation(self, record: dict[str, Any]) -> None:
        self._write("evaluations", record)

    def video(self, record: dict[str, Any], gif: Path) -> None:
        """Show a video of an evaluation's first episode in TensorBoard."""
        with contextlib.suppress(OSError):
            self._tensorboard[0].image(record, "eval/video", gif.read_bytes())

    def _write(self, name: str, record: dict[str, Any]) -> None:
        try:
            self._files[name].append(to_line(record))
        except OSError as error:
            self._say(f"warning: cannot write {name}.jsonl, will try again: {error.strerror}")
        with contextlib.suppress(OSError):  # a full disk leaves a gap in TensorBoard
            every, by_step = self._tensorboard
            every.write(record)
            step = record["total/env_steps"]
            if step:  # none on recorded data alone
                named = {f"env_steps/{key}": record[key] for key in _BY_STEP if key in record}
                by_step.write({"total/env_steps": step} | named)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        for events in self._tensorboard:
            events.close()


class _TensorBoard:
    """Event files, written at once and in this thread, so that nothing is left to join.

    ``axis`` is the key of a record's position, ``start`` the position from which a resumed run
    writes again, ``options`` the run's settings for the HPARAMS page.

    The methods raise OSError if writing fails; the next record starts a new file, because this one
    may end within an event.
    """

    def __init__(self, directory: Path, axis: str, start: int, options: dict[str, Any]):
        self._directory, self._axis, self._options = directory, axis, options
        self._files = 0
        self._writer: EventsWriter | None = None
        self._purge: int | None = start or None

    def write(self, record: dict[str, Any]) -> None:
        """Write every number of a record."""
        self._events(
            record,
            *(
                summary.scalar(name, float(value))
                for name, value in record.items()
                if "/" in name and isinstance(value, (int, float)) and name != self._axis
            ),
        )

    def image(self, record: dict[str, Any], name: str, gif: bytes) -> None:
        """Write an animated image."""
        width, height = struct.unpack("<HH", gif[6:10])
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        self._events(record, Summary(value=[Summary.Value(tag=name, image=image)]))

    def _events(self, record: dict[str, Any], *summaries: Any) -> None:
        try:
            writer = self._open()
            if self._purge is not None:  # makes TensorBoard drop what a resumed run writes again
                start = SessionLog(status=SessionLog.START)
                writer.write_event(Event(step=self._purge, session_log=start))
            for each in [*self._head(), *summaries]:
                event = Event(wall_time=time.time(), step=record[self._axis], summary=each)
                writer.write_event(event)
            writer.flush()
            self._purge, self._options = None, {}
        except OSError:
            self.close()
            raise

    def _open(self) -> EventsWriter:
        if self._writer is None:
            self._files += 1
            self._directory.mkdir(exist_ok=True)
            suffix = f".{os.getpid()}.{self._files}"
            self._writer = EventsWriter(str(self._directory / "events"), suffix)
        return self._writer

    def _head(self) -> list[Any]:
        """The settings, at the beginning of a process's events."""
        if not self._options:
            return []
        table = "\n".join(f"| {name} | {value} |" for name, value in self._options.items())
        return [
            *summary.hparams(self._options, {"episode/return": 0, "eval/return": 0})[:2],
            summary.text("configuration", f"| option | value |\n|---|---|\n{table}"),
        ]

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()


class _Lines:
    """A file of whole lines."""

    def __init__(self, path: Path):
        self._file = open(path, "ab", buffering=0)
        self._size = self._file.tell()
        self._pending = b""

    def append(self, line: bytes) -> None:
        """Write a line, and those that failed before.

        Raises:
            OSError: if that fails; the lines are kept.
        """
        self._pending += line
        self._file.truncate(self._size)  # the partial write of a failed attempt
        written = 0
        while written < len(self._pending):
            written += self._file.write(self._pending[written:])
        os.fsync(self._file.fileno())
        self._size += len(self._pending)
        self._pending = b""

    def close(self) -> None:
        self._file.close()


def to_line(record: dict[str, Any]) -> bytes:
    """A record as a line of JSON, with null for non-finite numbers, which JSON lacks."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return [plain(item) for item in value] if isinstance(value, list) else value

    data = {name: plain(value) for name, value in record.items()}
    return json.dumps(data, allow_nan=False).encode() + b"\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, without unreadable lines."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The readable records of a file, and the number of unreadable lines."""
    records, unreadable = [], 0
    if path.exists():
        *whole, last = path.read_bytes().split(b"\n")
        for line in [*whole, last]:
            try:
                record = json.loads(line)
                if not isinstance(record["episode"], int):
                    raise TypeError("the number of an episode is an integer")
                records.append(record)
            except (ValueError, TypeError, LookupError, RecursionError):
                unreadable += line is not last  # a kill may have cut that one short
    return records, unreadable


def _trim(path: Path, episodes: int, say: Callable[[str], None]) -> None:
    """Keep the records of the first ``episodes`` episodes; report any other loss."""
    records, unreadable = _read(path)
    kept = [record for record in records if record["episode"] < episodes]
    try:
        if unreadable or (records and not episodes):
            aside = path.with_name(f"damaged-{path.name}")
            path.replace(aside)
            what = f"{unreadable} lines cannot be read" if unreadable else "no checkpoint knows it"
            say(f"warning: {path.name}: {what}; the original is {aside.name}")
        write_atomic(path, b"".join(map(to_line, kept)))
    except OSError as error:
        raise UsageError(f"cannot write to {path.parent}: {error.strerror}") from error
