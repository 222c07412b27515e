"""Records of a run, sent to Weights & Biases."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from valdi_jax.config import Config, to_dict
from valdi_jax.errors import UsageError
from valdi_jax.run import rundir


class WandB:
    """A context in which it is called with the records of a run, which a resumed one continues.

    It begins at the first record: the run then has its directory and its identity.

    Raises:
        UsageError: if the package is missing.
    """

    def __init__(self, run_dir: Path, config: Config):
        self._run_dir, self._config = run_dir, config
        self._run: Any = None
        if importlib.util.find_spec("wandb") is None:
            hint = "pip install 'valdi-jax[wandb]'"
            raise UsageError(f"--log wandb needs the extra: {hint}")

    def __call__(self, record: dict[str, Any]) -> None:
        if self._run is None:
            import wandb

            self._run = wandb.init(
                project="valdi-jax",
                name=self._run_dir.resolve().name,
                id=(rundir.identity(self._run_dir) or {}).get("id"),
                resume="allow",
                config=to_dict(self._config),
            )
            self._run.define_metric("*", step_metric="episode")
        self._run.log({name: value for name, value in record.items() if name != "returns"})

    def __enter__(self) -> WandB:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if kind is None else 1)
