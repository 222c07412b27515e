"""Train on the toy environment in its own process: python train_toy.py RUN EPISODES [WAY]."""

import dataclasses
import os
from pathlib import Path

from rich.console import Console
from toy import CONFIG, make_counting

from valdi_jax import cli
from valdi_jax.train import train

WAYS = {
    "plain": {},
    "workers": {"collect": {"num_envs": 2}},
    "lag": {"collect": {"num_envs": 2, "lag": 2}},
    "device": {"replay": {"placement": "device"}},
}


def main(arguments):
    directory, episodes, way = Path(arguments[0]), int(arguments[1]), [*arguments[2:], "plain"][0]
    config = dataclasses.replace(CONFIG, eval=dataclasses.replace(CONFIG.eval, every=0))
    config = config.replace(
        collect={"episodes": episodes},
        checkpoint={"every": 1, "keep": 2},
        replay={"capacity": 5},  # so that the ring is full for most of the run
    )
    config = config.replace(**WAYS[way])
    config = config.replace(collect={"worker_timeout": float(os.environ.get("TOY_TIMEOUT", "60"))})
    resume = (directory / "config.json").exists()
    try:
        train(config, directory, resume=resume, make=make_counting, console=Console(width=200))
    except cli.Interrupted:
        return 130
    return 0


if __name__ == "__main__":
    cli.run(main)
