"""Compiled programs: where they are kept between starts, and what they cost."""

from __future__ import annotations

import os
from pathlib import Path

import jax
from jax import monitoring


def cache_compilations() -> None:
    """Cache compiled programs on disk, so that the next start need not compile them again.

    The cache lies in the user's cache directory. ``JAX_COMPILATION_CACHE_DIR`` takes precedence;
    JAX reads it itself, on every backend. CPUs get no cache by default: on some, jaxlib rejects its
    own cached programs and logs an error for each (docs/decisions.md).
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.default_backend() == "cpu":
        return
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # no home
        return
    jax.config.update("jax_compilation_cache_dir", str(base / "valdi-jax"))


def compile_cost() -> tuple[float, int]:
    """Seconds spent compiling in this process, and the number of cache hits."""
    return sum(_compile_seconds), sum(_cache_hits)


_compile_seconds: list[float] = []
_cache_hits: list[int] = []


def _on_duration(event: str, duration_secs: float, **_: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compile_seconds.append(duration_secs)


def _on_event(event: str, **_: object) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _cache_hits.append(1)


monitoring.register_event_duration_secs_listener(_on_duration)
monitoring.register_event_listener(_on_event)
