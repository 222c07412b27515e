"""What a run writes down: metrics.jsonl, evaluations.jsonl and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from valdi_jax.errors import UsageError
from valdi_jax.run.manifest import write_atomic


class RunLog:
    """Appends to ``metrics.jsonl`` and ``evaluations.jsonl``, and to TensorBoard.

    Each line is on disk before the call returns; where it cannot be written, it is kept and written
    with the next. Lines beyond ``episodes`` are dropped at the start: a run that resumes from an
    older checkpoint collects those episodes again.

    Args:
        run_dir: directory of the run.
        episodes: collected so far.
        say: called with a sentence where a line cannot be written.
    """

    def __init__(self, run_dir: Path, *, episodes: int, say: Callable[[str], None] = print):
        # Here, as it imports PyTorch if that is installed, for seconds.
        from tensorboardX import SummaryWriter

        self._say = say
        self._files = {}
        for name in ("metrics", "evaluations"):
            path = run_dir / f"{name}.jsonl"
            _truncate(path, episodes)
            self._files[name] = _Lines(path)
        # purge_step makes TensorBoard itself drop what a resumed run writes again. Its queue has no
        # limit: should its thread die of a full disk, a full queue would block the training.
        self._tensorboard = SummaryWriter(str(run_dir), purge_step=episodes or None, max_queue=0)

    def episode(self, record: dict[str, Any]) -> None:
        """One finished training episode."""
        self._write("metrics", record)

    def evaluation(self, record: dict[str, Any]) -> None:
        """One evaluation."""
        self._write("evaluations", record)

    def _write(self, name: str, record: dict[str, Any]) -> None:
        try:
            self._files[name].append(json.dumps(record) + "\n")
        except OSError as error:
            self._say(f"warning: cannot write {name}.jsonl, will try again: {error.strerror}")
        for key, value in record.items():
            if "/" in key and isinstance(value, (int, float)):
                self._tensorboard.add_scalar(key, value, record["episode"])

    def close(self) -> None:
        """Flush everything."""
        for file in self._files.values():
            file.close()
        with contextlib.suppress(OSError):  # of a disk that is still full
            self._tensorboard.close()


class _Lines:
    """A file of lines, each of them whole."""

    def __init__(self, path: Path):
        self._file = open(path, "ab", buffering=0)
        self._size = self._file.tell()
        self._pending = b""

    def append(self, line: str) -> None:
        """Write a line, and those that could not be written before.

        Raises:
            OSError: if that fails; the lines are kept.
        """
        self._pending += line.encode()
        self._file.truncate(self._size)  # what a full disk took of them the last time
        written = 0
        while written < len(self._pending):
            written += self._file.write(self._pending[written:])
        os.fsync(self._file.fileno())
        self._size += len(self._pending)
        self._pending = b""

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line that was cut short is left out."""
    records = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


def _truncate(path: Path, episodes: int) -> None:
    kept = [r for r in read_jsonl(path) if r["episode"] < episodes]
    try:
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
    except OSError as error:
        raise UsageError(f"cannot write to {path.parent}: {error.strerror}") from error
