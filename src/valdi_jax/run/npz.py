"""Episodes and batches as .npz files, without a pickle."""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from valdi_jax.config import Config
from valdi_jax.data.episode import Episode
from valdi_jax.errors import UsageError
from valdi_jax.observation import Observation
from valdi_jax.run.manifest import write_atomic
from valdi_jax.types import Batch

# Exceptions that reading a damaged .npz file can raise.
_DAMAGED = (
    *(OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, SyntaxError),
    *(RuntimeError, OverflowError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
)


def save_episode(run_dir: Path, number: int, episode: Episode) -> str:
    """Write one episode of the replay buffer atomically; returns the file's checksum."""
    path = episode_path(run_dir, number)
    path.parent.mkdir(exist_ok=True)
    return _write_arrays(path, _episode_arrays(episode))


def pack_episode(episode: Episode) -> bytes:
    """The content of an episode's file."""
    return _pack(_episode_arrays(episode))


def _episode_arrays(episode: Episode) -> dict[str, np.ndarray | None]:
    return {
        "actions": episode.actions,
        "rewards": episode.rewards,
        "flags": np.array([episode.terminated, episode.truncated]),
        "seed": np.array(episode.seed, np.int64),
        "image": episode.observations.image,
        "vector": episode.observations.vector,
    }


def save_batch(run_dir: Path, number: int, batch: Batch) -> Path:
    """Save the batch of an update for inspection."""
    path = run_dir / "nonfinite" / f"{number:08d}.npz"
    path.parent.mkdir(exist_ok=True)
    arrays = {
        "image": batch.observations.image,
        "vector": batch.observations.vector,
        "actions": batch.actions,
        "rewards": batch.rewards,
        "terminals": batch.terminals,
        "within": batch.within,
    }
    _write_arrays(path, arrays)
    return path


def _write_arrays(path: Path, arrays: dict[str, np.ndarray | None]) -> str:
    """Write an .npz file atomically; returns its checksum."""
    content = _pack(arrays)
    write_atomic(path, content)
    return hashlib.sha256(content).hexdigest()


def _pack(arrays: dict[str, np.ndarray | None]) -> bytes:
    """The arrays that are not None as an .npz file.

    Equal arrays give equal bytes, because no date is written.
    """
    content = io.BytesIO()
    # Level 1 shrinks rendered frames twelvefold, in 50 ms per episode.
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, array in arrays.items():
            if array is not None:
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, np.asarray(array), allow_pickle=False)
                member = zipfile.ZipInfo(f"{name}.npy")
                file.writestr(member, buffer.getbuffer(), zipfile.ZIP_DEFLATED, compresslevel=1)
    return content.getvalue()


def _unpack(
    packed: Path | IO[bytes], check: Callable[[dict[str, Any]], None]
) -> dict[str, np.ndarray]:
    """Read an .npz file, after ``check`` of all headers: (shape, dtype) of every array by name.

    Nothing is allocated before. ``check`` raises ValueError if they are wrong.
    """
    headers, arrays = {}, {}
    with zipfile.ZipFile(packed) as file:
        for info in file.infolist():
            with file.open(info) as member:
                version = np.lib.format.read_magic(member)
                read_header = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[version]
                shape, _, dtype = read_header(member)
                size = math.prod(shape) * dtype.itemsize
                if dtype.hasobject or member.tell() + size != info.file_size:
                    raise ValueError(f"{info.filename} is not the array that it says it is")
            headers[info.filename.removesuffix(".npy")] = (shape, dtype)
        check(headers)
        for info in file.infolist():
            with file.open(info) as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
            arrays[info.filename.removesuffix(".npy")] = array
    return arrays


def load_episode(run_dir: Path, number: int, example: Observation, config: Config) -> Episode:
    """Read one episode of the replay buffer; ``example`` is an observation of the agent.

    Raises:
        UsageError: if it is missing, cannot be read, or is of another environment.
    """
    path = episode_path(run_dir, number)
    try:
        return _read_episode(path, example, config)
    except _DAMAGED as error:
        raise UsageError(f"cannot read the episode {path}: {error!r}") from error


def unpack_episode(content: bytes, example: Observation, config: Config) -> Episode:
    """`load_episode` from the content of its file."""
    return _read_episode(io.BytesIO(content), example, config)


def _read_episode(packed: Path | IO[bytes], example: Observation, config: Config) -> Episode:
    """Raises one of _DAMAGED."""

    def check(given: dict[str, Any]) -> None:
        length = given["rewards"][0][0]
        frames = -(-length // config.frame_stride) + 1
        expected: dict[str, tuple[tuple[int, ...], Any]] = {
            "actions": ((length, config.model.action_dim), np.float32),
            "rewards": ((length,), np.float32),
            "flags": ((2,), np.bool_),
            "seed": ((), np.int64),
        }
        for name in ("image", "vector"):
            part = getattr(example, name)
            if part is not None:
                expected[name] = ((frames, *part.shape), part.dtype)
        if not length or given != expected:
            raise ValueError(f"it holds {given}, not {expected}"[:1000])

    arrays = _unpack(packed, check)
    terminated, truncated = (bool(flag) for flag in arrays["flags"])
    return Episode(
        observations=Observation(image=arrays.get("image"), vector=arrays.get("vector")),
        actions=arrays["actions"],
        rewards=arrays["rewards"],
        terminated=terminated,
        truncated=truncated,
        seed=int(arrays["seed"]),
    )


def prune_episodes(run_dir: Path, *, before: int) -> None:
    """Delete the episodes numbered below ``before``."""
    for path in (run_dir / "replay").glob("[0-9]" * 8 + ".npz"):
        if int(path.stem) < before:
            path.unlink()


def episode_path(run_dir: Path, number: int) -> Path:
    """The file of an episode of the replay buffer."""
    return run_dir / "replay" / f"{number:08d}.npz"
