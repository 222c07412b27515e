"""Environments stepped a chunk of actions at a time, in this process or in worker processes.

Nothing here needs JAX: a worker process starts in a fraction of the time.
"""

from __future__ import annotations

import abc
import contextlib
import ctypes
import dataclasses
import functools
import math
import multiprocessing
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from valdi_jax.envs.spaces import Interface
from valdi_jax.errors import StoppedError
from valdi_jax.observation import Observation

_WORKER_LOSSES = 3  # of one worker in a row, without an answer in between, are given up on


@dataclasses.dataclass(frozen=True)
class Steps:
    """What a chunk of actions led to: n <= C steps, fewer where the episode ended."""

    observations: list[Observation]  # after each step, or after the last alone
    rewards: list[float]  # n
    terminated: bool
    truncated: bool


class Stepper:
    """One environment in this process.

    Args:
        factory: makes it. Where it has an attribute ``skip_frames`` and a method ``redraw``, the
            observations that are not kept are not drawn.
        last_only: keep of each chunk only the last observation.
    """

    def __init__(self, factory: Callable[[], gym.Env], *, last_only: bool = False):
        self._env = factory()
        self._interface = Interface(self._env.observation_space, self._env.action_space)
        self._last_only = last_only
        skips = last_only and hasattr(self._env, "skip_frames")
        self._drawing: Any = self._env if skips else None  # Any: a gym.Env has neither of the two

    def reset(self, seed: int) -> Observation:
        """Start an episode."""
        self._skip(False)
        observation, _ = self._env.reset(seed=seed)
        return self._interface.observe(observation)

    def step(self, actions: np.ndarray) -> Steps:
        """Take a chunk of actions [C, A] in [-1, 1], stopping where the episode ends."""
        observations, rewards, terminated, truncated = [], [], False, False
        for i, action in enumerate(actions):
            last = i == len(actions) - 1
            self._skip(not last)
            observation, reward, terminated, truncated, _ = self._env.step(
                self._interface.act(action)
            )
            rewards.append(float(reward))
            done = terminated or truncated
            if done and self._drawing is not None and not last:  # its last frame is kept after all
                observation = self._drawing.redraw()
            if last or done or not self._last_only:
                observations.append(self._interface.observe(observation))
            if not np.isfinite(rewards[-1]):
                raise ValueError(f"the environment's reward is {rewards[-1]}")
            if done:
                break
        return Steps(observations, rewards, bool(terminated), bool(truncated))

    def _skip(self, skip: bool) -> None:
        if self._drawing is not None:
            self._drawing.skip_frames = skip

    def close(self) -> None:
        """Release the environment."""
        self._env.close()


class Pool(abc.ABC):
    """N environments; requests are made for several at once.

    An environment that was lost on the way is missing from an answer. It can be used again,
    beginning with a reset.

    Attributes:
        size: how many there are.
        restarts: workers that were lost and started anew.
    """

    size: int
    restarts: int = 0

    def __init__(self, factory: Callable[[], gym.Env], *, last_only: bool = False):
        self._kind = _Kind("", functools.partial(Stepper, factory, last_only=last_only))

    @contextlib.contextmanager
    def serving(
        self, name: str, factory: Callable[[], gym.Env], *, last_only: bool = False
    ) -> Iterator[None]:
        """A context in which the pool steps environments of another kind.

        They are made where they are first needed, and kept: a name stands for one factory.
        """
        make = functools.partial(Stepper, factory, last_only=last_only)
        before, self._kind = self._kind, _Kind(name, make)
        try:
            yield
        finally:
            self._kind = before

    @abc.abstractmethod
    def reset(self, seeds: dict[int, int]) -> dict[int, Observation]:
        """Start an episode in each environment named, with the seed given."""

    @abc.abstractmethod
    def send(self, actions: dict[int, np.ndarray]) -> None:
        """Have each environment named take a chunk of actions [C, A]."""

    @abc.abstractmethod
    def receive(self, indices: Iterable[int]) -> dict[int, Steps]:
        """What the chunks led to that were sent to these environments."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release all environments."""


class _Kind(NamedTuple):
    """Environments of one factory, by the name that a pool knows them by."""

    name: str
    make: Callable[[], Stepper]


class _Place:
    """One place of a pool: an environment of each kind that was asked for."""

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
    """A pool of one environment, in this process."""

    size = 1

    def __init__(self, factory: Callable[[], gym.Env], *, last_only: bool = False):
        super().__init__(factory, last_only=last_only)
        self._place = _Place()
        self._answers: dict[int, Steps] = {}

    def reset(self, seeds: dict[int, int]) -> dict[int, Observation]:
        """See `Pool`."""
        return {index: self._place.reset(self._kind, seed) for index, seed in seeds.items()}

    def send(self, actions: dict[int, np.ndarray]) -> None:
        """See `Pool`; here it is done at once."""
        self._answers = {index: self._place.step(chunk) for index, chunk in actions.items()}

    def receive(self, indices: Iterable[int]) -> dict[int, Steps]:
        """See `Pool`."""
        return {index: self._answers[index] for index in indices}

    def close(self) -> None:
        """See `Pool`."""
        self._place.close()


class WorkerPool(Pool):
    """A pool of worker processes, one environment each, stepped in parallel.

    Observations come through shared memory, all else through a pipe. A worker that dies, or does
    not answer in time, is replaced by a new one.

    Args:
        factory: makes an environment; it must pickle.
        size: how many.
        example: an observation of it.
        chunk: most steps C of a chunk.
        last_only: keep of each chunk only the last observation.
        timeout: seconds that a worker may take to answer.

    Raises:
        RuntimeError: from ``reset`` and ``receive``, with the traceback, if a worker's environment
            raised.
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
        self._losses = [0] * size  # of each environment, in a row
        self._deadlines = [math.inf] * size
        self._workers = [self._start(index) for index in range(size)]

    def reset(self, seeds: dict[int, int]) -> dict[int, Observation]:
        """See `Pool`."""
        self._ask("reset", {index: (self._kind, seed) for index, seed in seeds.items()})
        return {index: observations[0] for index, (observations, _) in self._answers(seeds)}

    def send(self, actions: dict[int, np.ndarray]) -> None:
        """See `Pool`."""
        self._ask("step", {index: (chunk,) for index, chunk in actions.items()})

    def receive(self, indices: Iterable[int]) -> dict[int, Steps]:
        """See `Pool`."""
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
        return _Worker(process, ours, _views(memory, self._shapes))

    def _ask(self, method: str, arguments: dict) -> None:
        for index, argument in arguments.items():
            self._deadlines[index] = time.monotonic() + self._timeout
            with contextlib.suppress(OSError):  # a dead one: there will be no answer either
                self._workers[index].pipe.send((method, argument))

    def _answers(self, indices: Iterable[int]) -> list[tuple[int, tuple]]:
        """(index, (observations, what else was answered)) of the workers that answered."""
        answers = []
        for index in indices:
            worker = self._workers[index]
            try:
                if not worker.pipe.poll(max(0.0, self._deadlines[index] - time.monotonic())):
                    raise TimeoutError(f"no answer in {self._timeout:g} s")
                answer = worker.pipe.recv()
            except (EOFError, OSError) as error:
                self._replace(index, error)
                continue
            self._losses[index] = 0
            if not isinstance(answer, str):
                count, rest = answer
                # A copy: the next chunk is written over this one.
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
                f"a row (exit code {worker.process.exitcode}, {error!r})"
            ) from error
        self._workers[index] = self._start(index)
        self.restarts += 1

    def close(self) -> None:
        """See `Pool`."""
        for worker in self._workers:
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join(timeout=5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection
    views: Observation  # [C, ...] of the memory that it shares


_Shapes = list[tuple[str, tuple[int, ...], str, int]]  # name, shape, dtype, bytes of each array


def _chunk_shapes(example: Observation, chunk: int) -> _Shapes:
    """Of the observations of a chunk; the wider type first, so that each is aligned."""
    named = [("vector", example.vector), ("image", example.image)]
    return [
        (name, (chunk, *part.shape), part.dtype.str, chunk * part.nbytes)
        for name, part in named
        if part is not None
    ]


def _views(memory: ctypes.Array, shapes: _Shapes) -> Observation:
    """The shared memory as the observations of a chunk."""
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
    """A pool of ``size`` environments; a single one needs no process of its own."""
    if size == 1:
        return LocalPool(factory, last_only=last_only)
    return WorkerPool(
        factory, size, example=example, chunk=chunk, last_only=last_only, timeout=timeout
    )


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


def _serve(pipe: Connection, memory: ctypes.Array, shapes: _Shapes) -> None:
    """Answer requests until the other end closes."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # where the parent could not see to it
        signal.signal(signum, signal.SIG_IGN)
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
    except Exception:  # whatever the environment raised: the parent raises it, with its traceback
        with contextlib.suppress(OSError):
            pipe.send(traceback.format_exc())
