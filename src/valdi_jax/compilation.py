"""Compiled programs: where they are kept between starts, and what they cost."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jaxlib
from jax import monitoring

from valdi_jax.run.manifest import write_atomic


def cache_compilations() -> None:
    """Cache compiled programs on disk, so that the next start need not compile them again.

    The cache lies in the user's cache directory. ``JAX_COMPILATION_CACHE_DIR`` takes precedence;
    JAX reads it itself, on every backend. On some CPUs jaxlib rejects its own cached programs with
    an error for each (docs/decisions.md), so that a trial decides, once for each CPU and jaxlib.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "valdi-jax"
    except RuntimeError:  # no home
        return
    if jax.default_backend() == "cpu":
        base = base / f"cpu-{_cpu()}-{jaxlib.__version__}"
        if not _keeps_programs(base):
            return
    jax.config.update("jax_compilation_cache_dir", str(base))
    for entry in base.glob("*-cache"):
        with contextlib.suppress(OSError):
            if not entry.stat().st_size:  # left by a full disk; JAX would not replace it
                entry.unlink()
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


_TRIAL = """
import sys, jax
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append("cache_hits" in event))
print(jax.jit(lambda x: jax.numpy.tanh(x @ x.T).sum())(jax.numpy.ones((64, 16))), any(hits))
"""


def _keeps_programs(directory: Path) -> bool:
    """Whether this CPU can run programs from the cache: tried once, then read from a file."""
    verdict = directory / "verdict"
    try:
        return verdict.read_text() == "yes"
    except OSError:
        pass
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as trial:
            print("trying once whether compiled programs can be kept on this CPU", file=sys.stderr)
            command = [sys.executable, "-c", _TRIAL, trial]
            first, second = (
                subprocess.run(
                    command,
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=True,
                    timeout=120,
                )
                for _ in range(2)
            )
    except (OSError, subprocess.SubprocessError):
        return False  # for now: the next start tries again
    value = first.stdout.split()[0]
    quiet = second.stderr.count("\n") <= first.stderr.count("\n")
    works = (first.stdout.split(), second.stdout.split()) == ([value, "False"], [value, "True"])
    with contextlib.suppress(OSError):
        write_atomic(verdict, b"yes" if works and quiet else b"no")
    return works and quiet


def _cpu() -> str:
    """A name for the kind of this CPU: a home may be shared by several machines."""
    about = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        about += next((line for line in lines if line.startswith("flags")), "")
    return hashlib.sha256(about.encode()).hexdigest()[:8]


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
