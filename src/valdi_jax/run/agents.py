"""Trained agents as files, in the layout that model hubs use.

    DIR/config.json          its configuration and how it was trained
    DIR/model.safetensors    its parameters, named by their path (``encoder.head.linear_0...``)

``config.json`` holds checksums of the parameters and of itself. Commands also take an agent bundled
with the package by its name (``python -m valdi_jax.evaluate carracing``).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from flax import traverse_util
from safetensors import SafetensorError

from valdi_jax.config import Config, from_dict, to_dict
from valdi_jax.errors import UsageError
from valdi_jax.run.manifest import file_digest, read_signed, write_atomic, write_signed
from valdi_jax.types import Params

CONFIG, TENSORS = "config.json", "model.safetensors"

_MALFORMED = (ValueError, LookupError, TypeError, AttributeError)

_PACKAGED = Path(__file__).parent.parent / "pretrained"


def packaged() -> list[str]:
    """Names of the bundled agents."""
    return sorted(path.parent.name for path in _PACKAGED.glob(f"*/{TENSORS}"))


def locate(where: Path) -> Path | None:
    """Directory of an exported agent, given itself, its tensor file, or a bundled agent's name.

    Raises:
        UsageError: if the path cannot be read.
    """
    try:
        if where.name == TENSORS and where.is_file():
            return where.parent
        if (where / TENSORS).is_file():
            return where
        return _PACKAGED / where if str(where) in packaged() and not where.exists() else None
    except OSError as error:
        raise UsageError(f"cannot read {str(where)[:80]}: {error.strerror}") from error


def save(
    directory: Path, params: Params, config: Config, *, half: bool, trained: dict[str, Any]
) -> None:
    """Write an agent to a new directory, atomically.

    ``trained`` is a record of its training. With ``half``, parameters are stored as float16, except
    running statistics.

    Raises:
        UsageError: if the directory exists or cannot be written, or a parameter is not finite or
            too large for float16.
    """
    tensors = {}
    for name, value in traverse_util.flatten_dict(params, sep=".").items():
        array = np.asarray(value)
        if half and not name.startswith(("normalizer.", "statistics.", "scalers.")):
            array = array.astype(np.float16)
        if not np.isfinite(array).all():
            raise UsageError(f"{name} is not finite{' in float16' if half else ''}")
        tensors[name] = array
    directory = Path(os.path.abspath(directory))  # noqa: PTH100, it need not exist
    if directory.exists():
        raise UsageError(f"{directory} exists already: give a new directory")
    partial = directory.with_name(f"partial-{directory.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_atomic(partial / TENSORS, safetensors.numpy.save(tensors))
        body = {
            "config": to_dict(config),
            "trained": trained,
            "tensors_sha256": file_digest(partial / TENSORS),
        }
        write_signed(partial / CONFIG, body)
        partial.rename(directory)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UsageError(f"cannot write {directory}: {error.strerror}") from error


def load(directory: Path) -> tuple[Config, Params, dict[str, Any]]:
    """Read an exported agent: its configuration, float32 parameters and training record.

    Raises:
        UsageError: if it is damaged or not an exported agent.
    """
    try:
        body = read_signed(directory / CONFIG)
        if file_digest(directory / TENSORS) != body["tensors_sha256"]:
            raise ValueError(f"{TENSORS} differs from its checksum")
        config, trained = from_dict(body["config"]), dict(body["trained"])
        params: Params = {}
        for name, array in safetensors.numpy.load_file(directory / TENSORS).items():
            if array.dtype not in (np.float16, np.float32) or not np.isfinite(array).all():
                raise ValueError(f"{name} does not hold finite numbers of float16 or float32")
            *path, last = name.split(".")
            place = params
            for part in path:
                place = place.setdefault(part, {})
            place[last] = array.astype(np.float32)
    except (UsageError, OSError, SafetensorError, *_MALFORMED) as error:
        raise UsageError(f"{directory} is not a whole exported agent: {error}") from error
    return config, params, trained
