"""CarRacing steps per second of one process, and the time of steps without frames.

All rows take the same actions on the same tracks in turn, a chunk of three steps at a time, so that
other load on the machine affects them equally. Each measured call is a chunk; the figures are per
step.

python benchmarks/env_hz.py --json env.json
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import jax
import measure
import numpy as np
from gymnasium.envs.box2d.car_racing import CarRacing

from valdi_jax.envs.carracing_render import FastCarRacing

CHUNK = 3  # environment steps per decision of the planner
EPISODE = 600


def follow(env: CarRacing) -> np.ndarray:
    """An action that follows the road, towards a point a few tiles ahead."""
    hull = env.car.hull
    track = np.array(env.track)[:, 2:]
    nearest = int(np.linalg.norm(track - hull.position, axis=1).argmin())
    x, y = track[(nearest + 4) % len(track)] - hull.position
    off = math.remainder(math.atan2(-x, y) - hull.angle, 2 * math.pi)
    return np.array([np.clip(-2 * off, -1, 1), 0.3 * (hull.linearVelocity.length < 45), 0])


def drive_chunk(env: CarRacing, drawn: range | list[int], action: np.ndarray) -> float:
    """Wall seconds per step of a chunk in which only the given steps are drawn."""
    start = time.perf_counter()
    for step in range(CHUNK):
        env.skip_frames = step not in drawn  # Gymnasium's own ignores it
        env.step(action)
    return (time.perf_counter() - start) / CHUNK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="measured for each row")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # only used to name the machine

    everything = range(CHUNK)
    envs = {
        "gymnasium": (CarRacing(), everything),
        "valdi": (FastCarRacing(), everything),
        "valdi/chunk": (FastCarRacing(), [CHUNK - 1]),
        "floor": (FastCarRacing(), []),
    }
    times = {name: [] for name in envs}
    leader, _ = envs["floor"]
    end = time.perf_counter() + arguments.seconds * (len(envs) - 1)
    seed = 0
    while time.perf_counter() < end:
        for env, _ in envs.values():
            env.reset(seed=seed)
        for _ in range(EPISODE // CHUNK):
            action = follow(leader)
            for name, (env, drawn) in envs.items():
                times[name].append(drive_chunk(env, drawn, action))
            if time.perf_counter() > end:
                break
        seed += 1

    floor = 1e3 * float(np.median(times.pop("floor")))
    rows = [
        {
            "name": name,
            "per_second": float(1 / np.mean(seconds)),
            "median_ms": float(1e3 * np.median(seconds)),
            "p99_ms": float(1e3 * np.percentile(seconds, 99)),
            "floor_ms": floor,
        }
        for name, seconds in times.items()
    ]
    measure.report(measure.machine_name(), rows, arguments.json)


if __name__ == "__main__":
    main()
