"""Progress display of a run."""

from __future__ import annotations

import os
import time
from collections import deque
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table


class Display:
    """Live table on a terminal, otherwise one line per episode (on recorded data, per epoch)."""

    def __init__(
        self, console: Console, total: int, done: int, returns: list[float], unit: str = "episode"
    ):
        self._console = console
        self._total, self._unit = total, unit
        self._first = self._done = done
        self._returns = deque(returns, maxlen=20)
        self._start = time.monotonic()
        self._record: dict[str, Any] = {}
        self._phase = "starting"
        self._live = Live(console=console, refresh_per_second=2, get_renderable=self._table)

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.phase("")  # what it was doing is over
        if self._console.is_terminal:
            self._live.stop()

    def phase(self, text: str) -> None:
        """Set what the run is doing now."""
        self._phase = text

    def say(self, text: str) -> None:
        """Print a line above the table."""
        try:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        except (BrokenPipeError, SystemExit):  # the reader closed the pipe: rich exits, train on
            self._console.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        except OSError:  # a full disk under the output, or a terminal that is gone: train on
            pass

    def episode(self, record: dict[str, Any]) -> None:
        """Show a finished episode's metrics."""
        self._record = record
        self._done += 1
        if "episode/return" in record:
            self._returns.append(record["episode/return"])
        if not self._console.is_terminal:
            self.say("  ".join(f"{name} {value}" for name, value in self._columns()))

    def _columns(self) -> list[tuple[str, str]]:
        record = self._record
        mean = sum(self._returns) / max(len(self._returns), 1)
        elapsed = time.monotonic() - self._start
        eta = (self._total - self._done) * elapsed / max(self._done - self._first, 1)

        def number(key: str, form: str) -> str:
            return format(record[key], form) if key in record else "-"

        episode = [
            ("return", number("episode/return", ".1f")),
            ("mean of 20", f"{mean:.1f}"),
            ("steps", number("episode/length", "d")),
            ("plan ms", number("time/plan_ms", ".0f")),
        ]
        return [
            (self._unit, f"{self._done}/{self._total}"),
            *(episode if "episode/return" in record else []),
            ("update ms", number("time/update_ms", ".0f")),
            ("loss", number("loss/total", ".3f")),
            (
                "left",
                time.strftime("%H:%M:%S", time.gmtime(eta))
                if eta < 86400
                else f"{eta / 86400:.1f} days",
            ),
        ]

    def _table(self) -> Table:
        columns = self._columns() if self._record else [(self._unit, f"{self._done}/{self._total}")]
        table = Table(*(name for name, _ in columns), caption=self._phase or None)
        table.add_row(*(value for _, value in columns))
        return table
