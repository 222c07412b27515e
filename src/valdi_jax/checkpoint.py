"""Checkpoints of a run: ``python -m valdi_jax.checkpoint RUN`` lists and verifies them.

``--export DIR`` writes the newest one as an exported agent (see `run.agents`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from valdi_jax import cli
from valdi_jax.config import from_dict
from valdi_jax.errors import UsageError
from valdi_jax.run import agents
from valdi_jax.run.checkpoint import verify, verify_replay
from valdi_jax.run.manifest import MANIFEST, read_signed
from valdi_jax.run.rundir import accept_config, checkpoints, latest, load_config
from valdi_jax.run.stored import export, open_agent

__all__ = ["main", "open_agent"]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line of the command that lists checkpoints."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run directory; with --export also one of its checkpoints. For an exported agent, verify it
    and print how it was trained."""
    export: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Export the agent to this new directory as config.json and model.safetensors, for evaluation
    and for new runs (--init-from)."""
    half: bool = False
    """Export in half precision (float16)."""
    accept_config: bool = False
    """Renew the checksum of RUN/config.json after an intended change."""


def main(argv: Sequence[str]) -> int:
    """List the checkpoints of a run and verify them; status 1 if any is damaged."""
    arguments = cli.parse(
        Arguments,
        argv,
        prog="python -m valdi_jax.checkpoint",
        description="List the checkpoints of a run and verify them, or export its agent.",
    )
    if arguments.half and not arguments.export:
        raise UsageError("--half is for --export")
    if arguments.accept_config:
        if arguments.export:
            raise UsageError("--accept-config and --export exclude each other")
        path = arguments.run / "config.json"
        try:
            from_dict(json.loads(path.read_bytes()))  # raises
            accept_config(arguments.run)
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{path} is not a valid configuration: {error}"[:300]) from error
        return 0
    exported = agents.locate(arguments.run)
    if exported and arguments.export:
        raise UsageError(f"{arguments.run} is an exported agent already")
    if exported:
        for name, value in agents.load(exported)[2].items():  # raises if it is damaged
            print(f"{name.replace('_', ' ')}: {value}")
        return 0
    if arguments.export:
        export(arguments.run, arguments.export, half=arguments.half)
        print(arguments.export)
        return 0
    run_dir = arguments.run
    load_config(run_dir)
    latest(run_dir)
    print(f"{'episodes':>8} {'updates':>8} {'MB':>7}  content SHA-256")
    problems = []
    for path in checkpoints(run_dir):
        for _ in range(2):  # again, if a run under way has replaced it meanwhile
            line, damage = _look(run_dir, path)
            if not damage or not path.exists():
                break
        if path.exists():
            print(line)
            problems += damage
    for sentence in dict.fromkeys(problems):
        print(sentence)
    return 1 if problems else 0


def _look(run_dir: Path, path: Path) -> tuple[str, list[str]]:
    """A line about a checkpoint, and what is wrong with it."""
    damage = []
    try:
        damage = verify(path) or list(verify_replay(run_dir, path).values())
        manifest = read_signed(path / MANIFEST)
        updates, content = manifest["updates"], manifest["content"]
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
    except (OSError, ValueError, KeyError) as error:
        updates, content, size = "?", "?", math.nan
        damage = damage or [f"{path} is damaged: {error}"]
    state = "  damaged" if damage else ""
    return f"{int(path.name):>8} {updates:>8} {size:>7.1f}  {content}{state}", damage


if __name__ == "__main__":
    cli.run(main)
