"""Trained agents on disk, in whatever form: runs, checkpoints, exported and bundled ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from valdi_jax.config import Config
from valdi_jax.errors import UsageError
from valdi_jax.model import params_shapes
from valdi_jax.observation import Observation
from valdi_jax.run import agents, checkpoint, rundir
from valdi_jax.run.manifest import MANIFEST, read_signed
from valdi_jax.types import Params

_READS = 5  # attempts to read an agent of a run in progress


@dataclasses.dataclass
class StoredAgent:
    """A trained agent on disk.

    Attributes:
        name: where it is; after `load`, the checkpoint that was read.
        config: the configuration that it was trained with.
        made_by: name of the custom factory of its environments, if any.
    """

    name: str
    config: Config
    read: Callable[[], tuple[Params, str]]
    made_by: str | None = None

    def load(
        self,
        observation: Observation | None = None,
        *,
        config: Config | None = None,
        fresh: Params | None = None,
    ) -> Params:
        """Load its parameters onto the device.

        Given an example ``observation``, check that all shapes fit ``config``, by default its own.
        Additional networks that it lacks are taken from ``fresh``, if given.

        Raises:
            UsageError: if it is damaged, or naming the first parameter that does not fit.
        """
        read, self.name = self.read()
        params = jax.tree.map(jnp.asarray, read)
        if fresh is not None:
            networks = (config or self.config).model.networks
            params = {name: fresh[name] for name in networks if name in fresh} | params
            if "statistics" in fresh:
                params["statistics"] = fresh["statistics"] | params.get("statistics", {})
        if observation is not None:
            template = params_shapes(observation, config=config or self.config)
            checkpoint.check_fit(checkpoint.shapes(params), checkpoint.shapes(template), self.name)
        return params


def open_agent(where: Path | str) -> StoredAgent:
    """Find an agent: a run (its newest checkpoint), a checkpoint, an exported or a bundled agent.

    Raises:
        UsageError: if it is none of these, or a damaged exported agent.
    """
    where = Path(where)
    exported = agents.locate(where)
    if exported is not None:
        config, params, trained = agents.load(exported)
        name = str(where)
        return StoredAgent(name, config, lambda: (params, name), trained.get("made_by"))
    run_dir, found = rundir.locate(where)
    if not run_dir.exists():
        raise UsageError(
            f"{where} is not a run directory, nor an agent that comes with the package "
            f"({', '.join(agents.packaged())})"
        )
    config = rundir.load_config(run_dir)
    made_by = (rundir.identity(run_dir) or {}).get("made_by")
    first = found or rundir.latest(run_dir)

    def read() -> tuple[Params, str]:
        chosen = first
        for _ in range(_READS):
            try:
                return checkpoint.read_params(chosen), str(chosen)
            except (UsageError, OSError):
                if found or chosen.exists():  # else the run has replaced it
                    raise
            chosen = rundir.latest(run_dir)
        raise UsageError(f"{run_dir} replaces its checkpoints faster than they can be read")

    return StoredAgent(str(first), config, read, made_by)


def export(run: Path, directory: Path, *, half: bool = False) -> None:
    """Export the agent of a run, or of one of its checkpoints (see `agents`).

    Raises:
        UsageError: if there is no such agent, or the directory exists or cannot be written.
    """
    run_dir, found = rundir.locate(run)
    config, found = rundir.load_config(run_dir), found or rundir.latest(run_dir)
    params = checkpoint.read_params(found)  # verifies all that is read below
    progress = checkpoint.load_progress(found / "progress.json")
    trained = {
        "episodes": progress.episodes,
        "environment_steps": progress.env_steps,
        "updates": read_signed(found / MANIFEST)["updates"],
        "hours": round(progress.seconds / 3600, 2),
    }
    made_by = (rundir.identity(run_dir) or {}).get("made_by")
    if made_by:
        trained["made_by"] = made_by
    agents.save(directory, params, config, half=half, trained=trained)
