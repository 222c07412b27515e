"""Environments stepped a chunk of actions at a time, in this process or in worker processes.

Nothing here needs JAX, so worker processes start in a fraction of the time.
"""

from __future__ import annotations

import abc
import contextlib
import ctypes
import dataclasses
import functools
import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from valdi_jax.envs.spaces import Interface
from valdi_jax.errors import StoppedError, UsageError
from valdi_jax.observation import Observation

_FIRST_ANSWER = 600.0  # more seconds for a first answer: imports, simulator start
_LONGEST_WAIT = 1e6  # seconds: the system refuses some longer ones
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_WORKER_LOSSES = 3  # consecutive losses of one worker before giving up


@dataclasses.dataclass(frozen=True)
class Steps:
    """Result of a chunk of actions: n <= C steps, fewer if the episode ended."""

    observations: list[Observation]  # after each step, or only after the last
    rewards: list[float]  # n
    terminated: bool
    truncated: bool


class Stepper:
    """One environment in this process.

    Args:
        factory: makes it. If it has an attribute ``skip_frames`` and a method ``redraw``,
            observations that are not kept are not drawn.
        last_only: keep only the last observation of each chunk.
    """

    def __init__(self, factory: Callable[[], gym.Env], *, last_only: bool = False):
        self._env = factory()
        self._interface = Interface(self._env.observation_space, self._env.action_space)
        self._last_only = last_only
        skips = last_only and hasattr(self._env, "skip_frames")
        self._drawing: Any = self._env if skips else None  # Any: gym.Env declares neither

    def reset(self, seed: int) -> Observation:
        self._skip(False)
        answer = _own_errors(self._env.reset, seed=seed)
        if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[1], dict):
            raise ValueError(
                "the environment's reset must return an observation and a dict, as in Gymnasium; "
                f"it returned {_kinds(answer)}: the wrappers of shimmy adapt the old API"
            )
        return self._interface.observe(answer[0])

    def step(self, actions: np.ndarray) -> Steps:
        """Take a chunk of actions [C, A] in [-1, 1], up to the end of the episode."""
        observations, rewards, terminated, truncated = [], [], False, False
        for i, action in enumerate(actions):
            last = i == len(actions) - 1
            self._skip(not last)
            answer = _own_errors(self._env.step, self._interface.act(action))
            if not isinstance(answer, tuple) or len(answer) != 5:
                raise ValueError(
                    "the environment's step must return observation, reward, terminated, truncated "
                    f"and a dict, as in Gymnasium; it returned {_kinds(answer)}: the wrappers of "
                    "shimmy adapt the old API"
                )
            observation, reward, terminated, truncated, _ = answer
            rewards.append(_number(reward))
            done = terminated or truncated
            if done and self._drawing is not None and not last:  # the episode's last frame is kept
                observation = self._drawing.redraw()
            if last or done or not self._last_only:
                observations.append(self._interface.observe(observation))
            if done:
                break
        return Steps(observations, rewards, bool(terminated), bool(truncated))

    def _skip(self, skip: bool) -> None:
        if self._drawing is not None:
            self._drawing.skip_frames = skip

    def close(self) -> None:
        self._env.close()


def _own_errors(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of a call; an environment's attempt to end the process is an error."""
    try:
        return call(*args, **kwargs)
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"the environment raised {error!r}") from error


def _number(reward: Any) -> float:
    """A reward of any numeric type, rounded to float32.

    Raises:
        ValueError: if it is not one finite number.
    """
    array = np.asarray(reward)
    if array.size != 1 or array.dtype.kind not in "biuf":
        raise ValueError(f"the environment's reward is {reward!r}, not one number"[:200])
    with np.errstate(over="ignore"):
        number = float(np.float32(array.item()))
    if not math.isfinite(number):
        raise ValueError(f"the environment's reward is {array.item()}, not finite in float32")
    return float(array.item())


def _kinds(answer: Any) -> str:
    if isinstance(answer, tuple):
        return f"{len(answer)} values ({', '.join(type(part).__name__ for part in answer)})"[:200]
    return f"a {type(answer).__name__}"


class Pool(abc.ABC):
    """N environments, addressed several at once by their indices.

    A lost environment is missing from the result; it can be used again after a reset.

    Attributes:
        size: number of environments.
        restarts: lost workers that were replaced.
    """

    size: int
    restarts: int = 0

    def __init__(self, factory: Callable[[], gym.Env], *, last_only: bool = False):
        self._kind = _Kind("", functools.partial(Stepper, factory, last_only=last_only))

    @contextlib.contextmanager
    def serving(
        self, name: str, factory: Callable[[], gym.Env], *, last_only: bool = False
    ) -> Iterator[None]:
        """Context in which the pool steps environments of another factory.

        They are made on first use and kept: a name stands for one factory.
        """
        make = functools.partial(Stepper, factory, last_only=last_only)
        before, self._kind = self._kind, _Kind(name, make)
        try:
            yield
        finally:
            self._kind = before

    @abc.abstractmethod
    def reset(self, seeds: dict[int, int]) -> dict[int, Observation]:
        """Start an episode in each environment, with the given seed."""

    @abc.abstractmethod
    def send(self, actions: dict[int, np.ndarray]) -> None:
        """Send each environment a chunk of actions [C, A]."""

    @abc.abstractmethod
    def receive(self, indices: Iterable[int]) -> dict[int, Steps]:
        """Results of the chunks sent to these environments."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release all environments."""


class _Kind(NamedTuple):
    """A factory of environments and its name in the pool."""

    name: str
    make: Callable[[], Stepper]


class _Place:
    """One place of a pool: an environment of each kind requested so far."""

    def __init__(self) -> None:
        self._made: dict[str, Stepper] = {}

    def reset(self, kind: _Kind, seed: int) -> Observation:
        if kind.name not in self._made:
            self._made[kind.name] = kind.make()
        self.current = self._made[kind.name]
        return self.current.reset(seed)

    def step(self, actions: np.ndarray) -> Steps:
        return self.current.step(actions)

    def close(self) -> None:
        for stepper in self._made.values():
            stepper.close()


class LocalPool(Pool):
    """A pool of one environment, in this process; `send` already takes the steps."""

    size = 1

    def __init__(self, factory: Callable[[], gym.Env], *, last_only: bool = False):
        super().__init__(factory, last_only=last_only)
        self._place = _Place()
        self._answers: dict[int, Steps] = {}

    def reset(self, seeds: dict[int, int]) -> dict[int, Observation]:
        return {index: self._place.reset(self._kind, seed) for index, seed in seeds.items()}

    def send(self, actions: dict[int, np.ndarray]) -> None:
        self._answers = {index: self._place.step(chunk) for index, chunk in actions.items()}

    def receive(self, indices: Iterable[int]) -> dict[int, Steps]:
        return {index: self._answers[index] for index in indices}

    def close(self) -> None:
        self._place.close()


class WorkerPool(Pool):
    """A pool of worker processes, one environment each, stepped in parallel.

    Observations pass through shared memory, all else through a pipe. A worker that dies or times
    out is replaced.

    Args:
        factory: makes an environment; must be picklable.
        size: number of workers.
        example: an observation.
        chunk: maximum steps C of a chunk.
        last_only: keep only the last observation of each chunk.
        timeout: seconds that a worker may take to answer.

    Raises:
        RuntimeError: from ``reset`` and ``receive`` if an environment raised, with its traceback.
        StoppedError: if a worker was lost several times without an answer in between.
    """

    def __init__(
        self,
        factory: Callable[[], gym.Env],
        size: int,
        *,
        example: Observation,
        chunk: int,
        last_only: bool = False,
        timeout: float = 60.0,
    ):
        super().__init__(factory, last_only=last_only)
        self.size = size
        self._shapes = _chunk_shapes(example, chunk)
        self._timeout = timeout
        self._losses = [0] * size  # consecutive, of each environment
        self._deadlines = [math.inf] * size
        self._processes: dict[int, BaseProcess] = {}
        # A program that leaves a pool open still ends, though workers ignore its SIGTERM.
        self._end = weakref.finalize(self, _kill, self._processes)
        self._workers = [self._start(index) for index in range(size)]

    def reset(self, seeds: dict[int, int]) -> dict[int, Observation]:
        self._ask("reset", {index: (self._kind, seed) for index, seed in seeds.items()})
        return {index: observations[0] for index, (observations, _) in self._answers(seeds)}

    def send(self, actions: dict[int, np.ndarray]) -> None:
        self._ask("step", {index: (chunk,) for index, chunk in actions.items()})

    def receive(self, indices: Iterable[int]) -> dict[int, Steps]:
        return {index: Steps(*parts, *rest) for index, (*parts, rest) in self._answers(indices)}

    def _start(self, index: int) -> _Worker:
        # Spawned, not forked: a fork of a process with JAX's threads can deadlock.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        memory = context.RawArray("B", sum(nbytes for *_, nbytes in self._shapes))
        process = context.Process(
            target=_serve,
            args=(theirs, memory, self._shapes),
            name=f"env-{index}",
            daemon=True,
        )
        with _signals_ignored():
            process.start()
        theirs.close()
        self._processes[index] = process
        return _Worker(process, ours, _views(memory, self._shapes), set())

    def _ask(self, method: str, arguments: dict) -> None:
        for index, argument in arguments.items():
            first = 0.0 if self._kind.name in self._workers[index].known else _FIRST_ANSWER
            self._deadlines[index] = time.monotonic() + self._timeout + first
            with contextlib.suppress(OSError):  # a dead worker: `_answers` replaces it
                self._workers[index].pipe.send((method, argument))

    def _answers(self, indices: Iterable[int]) -> list[tuple[int, tuple]]:
        """(index, (observations, rest of the answer)) of the workers that answered."""
        answers = []
        for index in indices:
            worker = self._workers[index]
            try:
                left = self._deadlines[index] - time.monotonic()
                if not worker.pipe.poll(min(max(0.0, left), _LONGEST_WAIT)):
                    raise TimeoutError(f"no answer in {self._timeout:g} s")
                answer = worker.pipe.recv()
            except (EOFError, OSError) as error:
                self._replace(index, error)
                continue
            self._losses[index] = 0
            worker.known.add(self._kind.name)
            if not isinstance(answer, str):
                count, rest = answer
                # A copy: the next chunk overwrites the memory.
                observations = [
                    Observation(*(None if x is None else np.array(x[i]) for x in worker.views))
                    for i in range(count)
                ]
                answer = observations, rest
            answers.append((index, answer))
        for _, answer in answers:
            if isinstance(answer, str):
                raise RuntimeError(f"an environment worker failed:\n{answer}")
        return answers

    def _replace(self, index: int, error: OSError | EOFError) -> None:
        worker = self._workers[index]
        worker.pipe.close()
        worker.process.kill()
        worker.process.join()
        self._losses[index] += 1
        if self._losses[index] >= _WORKER_LOSSES:
            raise StoppedError(
                f"the environment worker {worker.process.name} was lost {_WORKER_LOSSES} times in "
                f"a row (exit code {worker.process.exitcode}, {error!r}); if it only takes long, "
                "--collect.worker-timeout gives it more time, and if it ended at once, a program "
                "that starts workers needs `if __name__ == '__main__':`"
            ) from error
        self._workers[index] = self._start(index)
        self.restarts += 1

    def close(self) -> None:
        for worker in self._workers:
            worker.pipe.close()
        deadline = time.monotonic() + 5  # of all together: one that still starts hears nothing
        for worker in self._workers:
            worker.process.join(timeout=max(0.0, deadline - time.monotonic()))
        self._end()


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection
    views: Observation  # [C, ...] views of the shared memory
    known: set[str]  # kinds of environments that have answered


_Shapes = list[tuple[str, tuple[int, ...], str, int]]  # name, shape, dtype, bytes of each array


def _chunk_shapes(example: Observation, chunk: int) -> _Shapes:
    """Arrays of a chunk's observations, the wider type first, for alignment."""
    named = [("vector", example.vector), ("image", example.image)]
    return [
        (name, (chunk, *part.shape), part.dtype.str, chunk * part.nbytes)
        for name, part in named
        if part is not None
    ]


def _views(memory: ctypes.Array, shapes: _Shapes) -> Observation:
    """The shared memory as a chunk's observations."""
    parts, start = {}, 0
    for name, shape, dtype, nbytes in shapes:
        flat = np.frombuffer(memoryview(memory), dtype, count=math.prod(shape), offset=start)
        parts[name] = flat.reshape(shape)
        start += nbytes
    return Observation(**parts)


def make_pool(
    factory: Callable[[], gym.Env],
    size: int,
    *,
    example: Observation,
    chunk: int,
    last_only: bool = False,
    timeout: float = 60.0,
) -> Pool:
    """A pool of ``size`` environments; a single one stays in this process.

    Raises:
        UsageError: if there are none.
    """
    if size < 1:
        raise UsageError(f"the number of environments is {size}; it must be above 0")
    if size == 1:
        return LocalPool(factory, last_only=last_only)
    return WorkerPool(
        factory, size, example=example, chunk=chunk, last_only=last_only, timeout=timeout
    )


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    """Context in which new processes ignore SIGINT and SIGTERM from their start.

    Both signals reach the whole process group, but only the parent handles them; the workers end
    when it closes their pipes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    previous = {s: signal.signal(s, signal.SIG_IGN) for s in _SIGNALS}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _kill(processes: dict[int, BaseProcess]) -> None:
    for process in processes.values():
        if process.is_alive():
            process.kill()
            process.join()


def _end_with_the_parent() -> None:
    """End when the parent ends, because a hanging environment would outlive it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _serve(pipe: Connection, memory: ctypes.Array, shapes: _Shapes) -> None:
    """Answer requests until the other end closes."""
    for signum in _SIGNALS:  # if the parent could not do it
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        place, views = _Place(), _views(memory, shapes)

        def write(observations: list[Observation]) -> int:
            for i, observation in enumerate(observations):
                for name, *_ in shapes:
                    getattr(views, name)[i] = getattr(observation, name)
            return len(observations)

        while True:
            method, arguments = pipe.recv()
            if method == "reset":
                pipe.send((write([place.reset(*arguments)]), ()))
            else:
                steps = place.step(*arguments)
                rest = steps.rewards, steps.terminated, steps.truncated
                pipe.send((write(steps.observations), rest))
    except (EOFError, ConnectionError):
        pass
    except Exception:  # of the environment: the parent raises it, with its traceback
        with contextlib.suppress(OSError):
            pipe.send(traceback.format_exc())
