"""Checksums and atomic writes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from valdi_jax.errors import UsageError

MANIFEST = "manifest.json"


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(tree: Any) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all leaves: equal for equal states."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def describe_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file under a directory, by relative path."""
    return {
        path.relative_to(directory).as_posix(): {
            "size": path.stat().st_size,
            "sha256": file_digest(path),
        }
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def read_signed(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds its own checksum.

    Raises:
        ValueError: if it is missing or damaged, in one sentence.
    """
    try:
        text = path.read_bytes()
        data = json.loads(text)
        body = {name: value for name, value in data.items() if name != "sha256"}
        if data["sha256"] != _digest(body) or text != _format(data):
            raise ValueError("it differs from its own checksum")
        return body
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def write_signed(path: Path, body: dict[str, Any]) -> None:
    """Write a JSON file that holds its own checksum."""
    write_atomic(path, _format(body | {"sha256": _digest(body)}))


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file."""
    write_atomic(path, json.dumps(data, indent=2).encode() + b"\n")


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write a file atomically and fsync it."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    flush(path.parent, recursive=False)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(_format(body)).hexdigest()


def _format(data: dict[str, Any]) -> bytes:
    return json.dumps(data, indent=2, sort_keys=True).encode() + b"\n"


def find_damage(directory: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """One sentence for each file that is missing or changed; others are ignored."""
    problems = []
    present = {
        path.relative_to(directory).as_posix(): path
        for path in directory.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }
    for name, expected in files.items():
        path = present.pop(name, None)
        if path is None:
            problems.append(f"{directory / name} is missing")
        elif path.stat().st_size != expected["size"]:
            problems.append(f"{path} has {path.stat().st_size} bytes instead of {expected['size']}")
        elif file_digest(path) != expected["sha256"]:
            problems.append(f"{path} differs from its checksum")
    return problems


def flush(directory: Path, *, recursive: bool = True) -> None:
    """fsync a directory, and its contents if ``recursive``."""
    inside = directory.rglob("*") if recursive else ()
    for path in [*inside, directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # not supported for directories by some file systems
                raise
        finally:
            os.close(descriptor)


def check_writable(path: Path) -> None:
    """Raise UsageError early if a file cannot be written."""
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    if not existed:
        path.unlink()
