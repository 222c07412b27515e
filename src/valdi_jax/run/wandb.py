"""Records of a run, sent to Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from valdi_jax.config import Config, to_dict
from valdi_jax.errors import UsageError


class WandB:
    """A context in which it is called with the records of a run, which a resumed one continues.

    Raises:
        UsageError: if the package is missing.
    """

    def __init__(self, run_dir: Path, config: Config):
        try:
            import wandb
        except ImportError:
            raise UsageError(
                "--log wandb needs the extra: pip install 'valdi-jax[wandb]'"
            ) from None
        # An identity of its own: the run's is written only once the directory is locked.
        name = run_dir.resolve().name
        self._run = wandb.init(
            project="valdi-jax", name=name, id=name, resume="allow", config=to_dict(config)
        )
        self._run.define_metric("*", step_metric="episode")

    def __call__(self, record: dict[str, Any]) -> None:
        self._run.log({name: value for name, value in record.items() if name != "returns"})

    def __enter__(self) -> WandB:
        return self

    def __exit__(self, *_: object) -> None:
        self._run.finish()
