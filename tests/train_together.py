"""Train on the toy environment in one of several processes.

python train_together.py RUN EPISODES COUNT RANK HOST:PORT
"""

import dataclasses
import os
import signal
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from toy import CONFIG, make_counting

from valdi_jax import cli
from valdi_jax.observation import Observation
from valdi_jax.run.learner import Learner
from valdi_jax.train import train

WATCHDOG, HEARTBEAT = 45, 10  # seconds


EXAMPLE = Observation(vector=np.zeros(2, np.float32))


def configuration(episodes, **learn):
    config = dataclasses.replace(CONFIG, eval=dataclasses.replace(CONFIG.eval, every=4, episodes=1))
    return config.replace(collect={"episodes": episodes}, checkpoint={"every": 1}, learn=learn)


def main(arguments):
    directory, episodes, count, rank = Path(arguments[0]), *map(int, arguments[1:4])
    config = configuration(
        episodes,
        processes=count,
        rank=rank,
        coordinator=arguments[4],
        watchdog=WATCHDOG,
        heartbeat=HEARTBEAT,
    )
    if fault := os.environ.get("TOY_FAULT"):  # kind, rank and update
        kind, whose, update = fault.split(":")
        if rank == int(whose):
            Learner._dispatch = faulty(kind, int(update), Learner._dispatch)
    Learner.follow = saying_updates(Learner.follow)
    resume = (directory / "config.json").exists()
    try:
        train(config, directory, resume=resume, make=make_counting, console=Console(width=200))
    except cli.Interrupted:
        return 130
    return 0


def saying_updates(work):
    """At the end of each call of a method of the learner, if by an exception."""

    def changed(learner, *arguments):
        try:
            return work(learner, *arguments)
        except cli.Interrupted:
            print(f"made {learner.updates} updates", flush=True)
            raise

    return changed


def faulty(kind, update, dispatch):
    def changed(learner, *arguments):
        if learner.updates == update:
            if kind == "sleep":
                time.sleep(600)
            if kind == "raise":
                raise OSError("the road is closed")
        dispatch(learner, *arguments)
        if kind == "slow":
            time.sleep(1)

    return changed


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
    cli.run(main)
