"""Results as files that say what made them."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import valdi_jax
from valdi_jax.run.manifest import write_json

HERE = Path(__file__).parent


def write(path: Path, rows: Sequence[dict[str, Any]], arguments: Sequence[str]) -> None:
    """Write rows with what is needed to make them again, atomically; ``arguments``: sys.argv."""
    packages = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    about = {
        "command": shlex.join(["python", f"experiments/{Path(arguments[0]).name}", *arguments[1:]]),
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            **packages,
            "valdi_jax": valdi_jax.__version__,
        },
        "cpu": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
    }
    write_json(path, about | {"rows": list(rows)})


def _commit() -> str | None:
    """Short hash of the commit; none outside a repository."""
    command = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
