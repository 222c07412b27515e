"""Train on the toy environment in its own process: python train_toy.py RUN EPISODES."""

import dataclasses
import sys
from pathlib import Path

from toy import CONFIG, make_counting

from valdi_jax.train import train

if __name__ == "__main__":
    directory, episodes = Path(sys.argv[1]), int(sys.argv[2])
    config = dataclasses.replace(CONFIG, eval=dataclasses.replace(CONFIG.eval, every=0))
    config = config.replace(
        collect={"episodes": episodes},
        checkpoint={"every": 1, "keep": 2},
        replay={"capacity": 5},  # so that the ring is full for most of the run
    )
    resume = (directory / "config.json").exists()
    train(config, directory, resume=resume, make=make_counting)
