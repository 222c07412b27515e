"""Train on the toy environment in one of several processes.

python train_together.py RUN EPISODES COUNT RANK HOST:PORT
"""

import dataclasses
import os
import time
from pathlib import Path

from rich.console import Console
from toy import CONFIG, make_counting

from valdi_jax import cli
from valdi_jax.run.learner import Learner
from valdi_jax.train import train

WATCHDOG, HEARTBEAT = 20, 10  # seconds


def main(arguments):
    directory, episodes = Path(arguments[0]), int(arguments[1])
    config = CONFIG.replace(
        collect={"episodes": episodes},
        checkpoint={"every": 1},
        learn={
            "processes": int(arguments[2]),
            "rank": int(arguments[3]),
            "coordinator": arguments[4],
            "watchdog": WATCHDOG,
            "heartbeat": HEARTBEAT,
        },
    )
    config = dataclasses.replace(config, eval=dataclasses.replace(CONFIG.eval, every=4, episodes=1))
    if "TOY_FAULT" in os.environ:  # KIND of fault, rank and update
        kind, rank, update = os.environ["TOY_FAULT"].split(":")
        if rank == arguments[3]:
            Learner._dispatch = faulty(kind, int(update), Learner._dispatch)
    resume = (directory / "config.json").exists()
    try:
        train(config, directory, resume=resume, make=make_counting, console=Console(width=200))
    except cli.Interrupted:
        return 130
    return 0


def faulty(kind, update, dispatch):
    def changed(learner, *arguments):
        if learner.updates == update:
            if kind == "sleep":
                time.sleep(600)
            if kind == "raise":
                raise OSError("the road is closed")
        dispatch(learner, *arguments)
        if kind == "slow":
            time.sleep(0.3)

    return changed


if __name__ == "__main__":
    cli.run(main)
