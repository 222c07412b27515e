"""The run directory: configuration, checkpoints and the replay's episodes.

    RUN/config.json               the resolved configuration
    RUN/run.json                  the run's identity, and the checksum of its configuration
    RUN/checkpoints/00000025/     after 25 episodes:
        params/                     the parameters to act with (Orbax)
        training/                   EMA, optimizer, step and key (Orbax); the online networks, if
                                    it acts with their average
        rounds/, rounds.json        parameters of rounds under way, with a lag (Orbax)
        progress.json               counters
        manifest.json               checksums of these files and of the replay's
    RUN/replay/00000024.npz       one episode, written once
    RUN/nonfinite/00000731.npz    the batch of an update whose loss was not finite
    RUN/metrics.jsonl             one line per episode
    RUN/evaluations.jsonl         one line per evaluation
    RUN/events.out.tfevents.*     TensorBoard; in env_steps/, over environment steps
    RUN/videos/00000050.gif       the first fixed episode, if eval.video asks for it
    RUN/lock                      held by the process that trains

All randomness derives from the seed and the counters, so there is no other state to save. Damaged
files are renamed with the prefix ``damaged-``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from valdi_jax.config import Config, added_since, from_dict, to_dict
from valdi_jax.errors import StoppedError, UsageError
from valdi_jax.run import agents
from valdi_jax.run.manifest import MANIFEST, file_digest, read_signed, write_atomic, write_signed

IDENTITY = "run.json"
_LARGEST_CONFIG = 1_000_000  # bytes


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((Path(run_dir) / "checkpoints").glob("[0-9]" * 8))


def latest(run_dir: Path) -> Path:
    """The newest checkpoint of a run.

    Raises:
        UsageError: if there is none.
    """
    found = checkpoints(run_dir)
    if not found:
        raise UsageError(f"{run_dir} holds no checkpoint yet")
    return found[-1]


def locate(path: Path) -> tuple[Path, Path | None]:
    """The run directory of a path, and the checkpoint if the path is one."""
    if path.parent.name == "checkpoints" and path.is_dir():
        return path.parent.parent, path
    return path, None


def identity(run_dir: Path) -> dict[str, Any] | None:
    """The run's identity; None for a run older than this feature.

    Raises:
        UsageError: if it is damaged.
    """
    path = Path(run_dir) / IDENTITY
    if not path.exists():
        return None
    try:
        body = read_signed(path)
        return {
            "id": body["id"],
            "made_by": body["made_by"],
            "data": body.get("data"),
            "config_sha256": body["config_sha256"],
        }
    except (ValueError, KeyError) as error:
        raise UsageError(
            f"{path} is damaged ({error}): delete it, and resuming makes a new one"
        ) from error


def load_config(run_dir: Path) -> Config:
    """The configuration of a run.

    Raises:
        UsageError: if this is not a run directory, or its configuration is not valid or differs
            from its checksum.
    """
    path = Path(run_dir) / "config.json"
    try:
        if not path.is_file():
            raise UsageError(f"{run_dir} is not a run directory: it has no config.json")
        if (Path(run_dir) / agents.TENSORS).exists():
            raise UsageError(f"{run_dir} is an agent, not a run: start one with --init-from")
        if path.stat().st_size > _LARGEST_CONFIG:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        content = path.read_bytes()
        data = json.loads(content)
    except (ValueError, OSError, RecursionError) as error:
        reason = str(error)[:200]
        raise UsageError(f"{path} is not a valid configuration: {reason}") from error
    try:
        config = from_dict(data)
    except UsageError as error:
        raise UsageError(f"{path} is not a valid configuration: {error}") from error
    known = identity(run_dir)
    if known and hashlib.sha256(content).hexdigest() not in known["config_sha256"]:
        raise UsageError(
            f"{path} differs from its checksum; if it was changed on purpose, python -m "
            f"valdi_jax.checkpoint {run_dir} --accept-config renews that"
        )
    return config


def options_since(run_dir: Path) -> list[str]:
    """Options added since a run began, which have their defaults there."""
    return added_since(json.loads((run_dir / "config.json").read_text()))


def save_config(run_dir: Path, config: Config) -> None:
    """Write the configuration of a run, and its checksum."""
    content = json.dumps(to_dict(config), indent=2).encode() + b"\n"
    accept_config(run_dir, hashlib.sha256(content).hexdigest(), keep=True)
    write_atomic(run_dir / "config.json", content)
    accept_config(run_dir, hashlib.sha256(content).hexdigest())


def accept_config(run_dir: Path, digest: str | None = None, *, keep: bool = False) -> None:
    """Record the checksum of the run's configuration.

    Args:
        run_dir: directory of the run.
        digest: checksum of the configuration, by default of the file.
        keep: also accept the previous checksum, in case of a kill before the file is replaced.
    """
    path = run_dir / "config.json"
    body = identity(run_dir)
    if body is None:  # an older run: its checkpoints stay its own
        own = [run for run in map(run_of, checkpoints(run_dir)) if run is not None]
        body = {"id": own[-1] if own else secrets.token_hex(16), "made_by": None}
        body["config_sha256"] = [file_digest(path)] if path.exists() else []
    accepted = [digest or file_digest(path)]
    if keep:
        accepted += body["config_sha256"]
    write_signed(run_dir / IDENTITY, {**body, "config_sha256": accepted})


def run_of(checkpoint: Path) -> str | None:
    """The id of the run that a checkpoint belongs to, as far as it is known and readable."""
    try:
        return read_signed(checkpoint / MANIFEST).get("run")
    except ValueError:
        return None


def set_aside(path: Path, why: str = "damaged") -> None:
    """Rename a file or directory, so that it no longer counts."""
    aside = path.with_name(f"{why}-{path.name}")
    if aside.is_dir():
        shutil.rmtree(aside)
    if path.exists():
        path.replace(aside)


class Lock:
    """A run directory that this process holds.

    Attributes:
        warning: a message to report, if any.
    """

    def __init__(self, run_dir: Path, file: IO[str], warning: str = ""):
        self._path, self._file, self.warning = run_dir / "lock", file, warning

    def check(self) -> None:
        """Raise StoppedError if the directory is no longer where it was."""
        try:
            here = self._path.stat().st_ino == os.fstat(self._file.fileno()).st_ino
        except OSError:
            here = False
        if not here:
            raise StoppedError(f"{self._path.parent} was moved or deleted while the run went on")


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[Lock]:
    """Lock a run directory, made if missing; the system unlocks it however the process ends.

    Raises:
        UsageError: if another process holds it, it cannot be written, its name would be misread, or
            it contains links that lead elsewhere.
    """
    if str(run_dir) in ("", "."):
        raise UsageError("the run directory is empty or the current one: give it a name")
    if any(character in str(run_dir.absolute()) for character in "[]*?"):
        raise UsageError(f"{run_dir.absolute()}: checkpoints need a path without any of []*?")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for path in run_dir.rglob("*"):
            if path.is_symlink():
                raise UsageError(f"{path} is a symbolic link, which would be written through")
        file = open(run_dir / "lock", "a+")
    except OSError as error:
        raise UsageError(f"cannot write to {run_dir}: {error.strerror or error}") from error
    with file:
        held = Lock(run_dir, file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UsageError(
                f"{run_dir} is in use by the process {file.read().strip() or 'that locked it'}"
            ) from None
        except OSError as error:  # some cluster file systems have no locks
            held.warning = f"{run_dir} cannot be locked ({error.strerror}): start one process alone"
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield held
