"""Environments stepped a chunk of actions at a time, in this process or in worker processes."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Protocol

import gymnasium as gym
import numpy as np

from valdi_jax.envs.spaces import Interface
from valdi_jax.types import Observation

_LOSSES = 3  # of one worker in a row, without an answer in between, are given up on


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
    """N environments; requests are made for several at once."""

    size: int
    restarts: int  # workers that were lost and started anew

    def reset(self, seeds: dict[int, int]) -> dict[int, Observation]:
        """Start an episode in each environment named, with the seed given.

        An environment that was lost on the way is missing from the answer. It can be used again,
        beginning with a reset. The same holds for `step`.
        """

    def step(self, actions: dict[int, np.ndarray]) -> dict[int, Steps]:
        """Take a chunk of actions [C, A] in each environment named."""

    def close(self) -> None:
        """Release all environments."""


class LocalPool:
    """A pool of one environment, in this process."""

    size = 1
    restarts = 0

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

    A worker that dies, or does not answer in time, is replaced by a new one.

    Args:
        factory: makes an environment; it must pickle.
        size: how many.
        timeout: seconds that a worker may take to answer.

    Raises:
        RuntimeError: from ``reset`` and ``step``, with the traceback, if a worker's environment
            raised; or if a worker was lost several times without an answer in between.
    """

    def __init__(self, factory: Callable[[], gym.Env], size: int, *, timeout: float = 60.0):
        self.size = size
        self.restarts = 0
        self._factory = factory
        self._timeout = timeout
        self._losses = [0] * size  # of each environment, in a row
        self._workers = [self._start(index) for index in range(size)]

    def reset(self, seeds: dict[int, int]) -> dict[int, Observation]:
        """See `Pool`."""
        return self._ask("reset", seeds)

    def step(self, actions: dict[int, np.ndarray]) -> dict[int, Steps]:
        """See `Pool`."""
        return self._ask("step", actions)

    def _start(self, index: int) -> tuple[BaseProcess, Connection]:
        # Spawned, not forked: a fork of a process with JAX's threads can deadlock.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve, args=(theirs, self._factory), name=f"env-{index}", daemon=True
        )
        with _signals_ignored():
            process.start()
        theirs.close()
        return process, ours

    def _ask(self, method: str, arguments: dict) -> dict:
        deadline = time.monotonic() + self._timeout
        for index, argument in arguments.items():
            with contextlib.suppress(OSError):  # a dead one: there will be no answer either
                self._workers[index][1].send((method, argument))
        answers = {}
        for index in arguments:
            _, pipe = self._workers[index]
            try:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"no answer in {self._timeout:g} s")
                answers[index] = pipe.recv()
            except (EOFError, OSError) as error:
                self._replace(index, error)
            else:
                self._losses[index] = 0
        for answer in answers.values():
            if isinstance(answer, str):
                raise RuntimeError(f"an environment worker failed:\n{answer}")
        return answers

    def _replace(self, index: int, error: OSError | EOFError) -> None:
        process, pipe = self._workers[index]
        pipe.close()
        process.kill()
        process.join()
        self._losses[index] += 1
        if self._losses[index] >= _LOSSES:
            raise RuntimeError(
                f"the environment worker {process.name} was lost {_LOSSES} times in a row (exit "
                f"code {process.exitcode}, {error!r})"
            ) from error
        self._workers[index] = self._start(index)
        self.restarts += 1

    def close(self) -> None:
        """See `Pool`."""
        for _, pipe in self._workers:
            pipe.close()
        for process, _ in self._workers:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def make_pool(factory: Callable[[], gym.Env], size: int, *, timeout: float = 60.0) -> Pool:
    """A pool of ``size`` environments; a single one needs no process of its own."""
    return LocalPool(factory) if size == 1 else WorkerPool(factory, size, timeout=timeout)


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
