"""Environments stepped a chunk of actions at a time, in this process or in worker processes."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Protocol

import gymnasium as gym
import numpy as np

from valdi_jax.envs.spaces import Interface
from valdi_jax.types import Observation


@dataclasses.dataclass(frozen=True)
class Steps:
    """What a chunk of actions led to: n <= C steps, fewer where the episode ended."""

    observations: list[Observation]  # n, after each step
    rewards: list[float]  # n
    terminated: bool
    truncated: bool


class Stepper:
    """One environment in this process."""

    def __init__(self, factory: Callable[[], gym.Env]):
        self._env = factory()
        self._interface = Interface(self._env.observation_space, self._env.action_space)

    def reset(self, seed: int) -> Observation:
        """Start an episode."""
        observation, _ = self._env.reset(seed=seed)
        return self._interface.observe(observation)

    def step(self, actions: np.ndarray) -> Steps:
        """Take a chunk of actions [C, A] in [-1, 1], stopping where the episode ends."""
        observations, rewards, terminated, truncated = [], [], False, False
        for action in actions:
            observation, reward, terminated, truncated, _ = self._env.step(
                self._interface.act(action)
            )
            observations.append(self._interface.observe(observation))
            rewards.append(float(reward))
            _check_finite(observations[-1], rewards[-1])
            if terminated or truncated:
                break
        return Steps(observations, rewards, bool(terminated), bool(truncated))

    def close(self) -> None:
        """Release the environment."""
        self._env.close()


def _check_finite(observation: Observation, reward: float) -> None:
    """Raises ValueError now: later it would be in the replay and in the normalisation for good."""
    if not np.isfinite(reward):
        raise ValueError(f"the environment's reward is {reward}")
    if observation.vector is not None and not np.isfinite(observation.vector).all():
        raise ValueError(f"the environment's observation is not finite: {observation.vector}")


class Pool(Protocol):
    """N environments; requests are made for several at once and answered in order."""

    size: int

    def reset(self, seeds: dict[int, int]) -> dict[int, Observation]:
        """Start an episode in each environment named, with the seed given."""

    def step(self, actions: dict[int, np.ndarray]) -> dict[int, Steps]:
        """Take a chunk of actions [C, A] in each environment named."""

    def close(self) -> None:
        """Release all environments."""


class LocalPool:
    """A pool of one environment, in this process."""

    size = 1

    def __init__(self, factory: Callable[[], gym.Env]):
        self._stepper = Stepper(factory)

    def reset(self, seeds: dict[int, int]) -> dict[int, Observation]:
        """See `Pool`."""
        return {index: self._stepper.reset(seed) for index, seed in seeds.items()}

    def step(self, actions: dict[int, np.ndarray]) -> dict[int, Steps]:
        """See `Pool`."""
        return {index: self._stepper.step(chunk) for index, chunk in actions.items()}

    def close(self) -> None:
        """See `Pool`."""
        self._stepper.close()


class WorkerPool:
    """A pool of worker processes, one environment each, stepped in parallel.

    Raises:
        RuntimeError: from ``reset`` and ``step``, with the traceback, if a worker's environment
            raised; or if a worker died.
    """

    def __init__(self, factory: Callable[[], gym.Env], size: int):
        self.size = size
        # Spawned, not forked: a fork of a process with JAX's threads can deadlock.
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for index in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, factory), name=f"env-{index}", daemon=True
            )
            with _signals_ignored():
                process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def reset(self, seeds: dict[int, int]) -> dict[int, Observation]:
        """See `Pool`."""
        return self._ask("reset", seeds)

    def step(self, actions: dict[int, np.ndarray]) -> dict[int, Steps]:
        """See `Pool`."""
        return self._ask("step", actions)

    def _ask(self, method: str, arguments: dict) -> dict:
        try:
            for index, argument in arguments.items():
                self._pipes[index].send((method, argument))
            answers = {index: self._pipes[index].recv() for index in arguments}
        except (EOFError, OSError) as error:
            codes = {p.name: p.exitcode for p in self._processes if p.exitcode is not None}
            raise RuntimeError(f"an environment worker died (exit codes {codes})") from error
        for answer in answers.values():
            if isinstance(answer, str):
                raise RuntimeError(f"an environment worker failed:\n{answer}")
        return answers

    def close(self) -> None:
        """See `Pool`."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def make_pool(factory: Callable[[], gym.Env], size: int) -> Pool:
    """A pool of ``size`` environments; a single one needs no process of its own."""
    return LocalPool(factory) if size == 1 else WorkerPool(factory, size)


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    """What starts within ignores SIGINT and SIGTERM from its first moment.

    Both reach the whole process group; the parent alone decides what they mean, and the workers
    end when it closes their pipes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    previous = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _serve(pipe: Connection, factory: Callable[[], gym.Env]) -> None:
    """Answer requests until the other end closes."""
    try:
        stepper = Stepper(factory)
        while True:
            method, argument = pipe.recv()
            pipe.send(getattr(stepper, method)(argument))
    except (EOFError, BrokenPipeError):
        pass
    except Exception:  # whatever the environment raised: the parent raises it, with its traceback
        pipe.send(traceback.format_exc())
