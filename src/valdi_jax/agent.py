"""An agent in hand: ``Agent.load("carracing").act(observation)``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax import planners
from valdi_jax.config import Config
from valdi_jax.data.rollout import Rollout, first_carries, plan_batch
from valdi_jax.data.source import sized
from valdi_jax.envs import interface_of, make_env, own_env
from valdi_jax.errors import UsageError
from valdi_jax.evaluate import evaluate
from valdi_jax.observation import Observation
from valdi_jax.run.stored import StoredAgent, open_agent
from valdi_jax.run.video import record_video
from valdi_jax.types import Array, Params, Plan


class Agent:
    """A trained agent that acts in its environment, or in several copies of it at once.

    Observations are the environment's, or `Observation`; with a leading axis they are those of
    several environments, and so are the actions. Actions are the environment's.

    Args:
        params: parameters of all networks.
        config: the configuration that they were trained with.
        make: called as ``make(config.env, training=False)`` for an environment.

    Raises:
        UsageError: if the environment cannot be made, or the parameters do not fit it.
    """

    def __init__(self, params: Params, config: Config, *, make: Callable[..., gym.Env] = make_env):
        self._make = make
        self._factory = functools.partial(own_env, make, config.env, training=False)
        self._interface = interface_of(self._factory)
        name = "the agent"
        self.config = sized(config, self._interface)
        given = StoredAgent(name, self.config, lambda: (params, name))
        self.params = given.load(self._interface.example)
        self._episodes = 0  # begun, for the keys
        self._rows: _Rows | None = None
        self._key: Array | None = None

    @classmethod
    def load(cls, where: Path | str, *, make: Callable[..., gym.Env] = make_env) -> Agent:
        """Load a run (its newest checkpoint), a checkpoint, an exported or a bundled agent.

        Raises:
            UsageError: if it is none of these, is damaged, does not fit its environment, or needs
                the ``make`` that it was trained with.
        """
        stored = open_agent(where)
        if stored.made_by and make is make_env:
            raise UsageError(
                f"{where} was trained on environments that {stored.made_by} makes: give it as make="
            )
        return cls(stored.load(), stored.config, make=make)

    def make_env(self, *, render_mode: str | None = None) -> gym.Env:
        """A new environment as in evaluation, held actions included.

        CarRacing goes on through terminal states there, and no episode ends by ``env.patience``.
        """
        if render_mode is None:
            return self._factory()
        made = functools.partial(self._make, render_mode=render_mode)
        return own_env(made, self.config.env, training=False)

    def reset(self, rows: Any = None, *, key: Array | None = None) -> None:
        """Begin an episode, in all environments or in those of the given ``rows`` only.

        The episode's plans derive from ``key``, by default another one each episode.

        Raises:
            UsageError: if there are no such rows.
        """
        if rows is None:
            self._rows, self._key = None, key
            return
        if self._rows is None:
            raise UsageError("reset() of some rows needs an act() before it, which tells how many")
        count = len(self._rows.left)
        index = np.asarray(rows)
        index = index if index.size else index.astype(int)  # an empty list is of floats
        try:
            chosen = np.arange(count)[index].reshape(-1)
        except IndexError as error:
            raise UsageError(f"reset() of rows {rows} of {count}: {error}") from error
        for row in chosen:
            self._rows.begin(int(row), self._next_key() if key is None else key)

    def act(
        self, observation: Mapping[str, Any] | np.ndarray | Observation, *, key: Array | None = None
    ) -> np.ndarray:
        """The next action. The agent plans once for each chunk of actions, and keeps the rest.

        Args:
            observation: the environment's, or several with a leading axis.
            key: to plan with, if a plan is due; by default the episode's.

        Returns: the action in the environment's bounds, or one for each observation.

        Raises:
            UsageError: if the observation does not fit the environment's space, or their number has
                changed since the last call without `reset`.
        """
        batch, single = self._observe(observation)
        count = batch.lead[0]
        if self._rows is None:
            first, self._key = self._key, None
            keys = [self._next_key() for _ in range(count)] if first is None else [first] * count
            self._rows = _Rows(keys, self.config)
        rows = self._rows
        if len(rows.left) != count:
            raise UsageError(
                f"act was given {count} observations, and {len(rows.left)} before: reset() begins "
                "the episodes of another number of environments"
            )
        if not rows.left.all():
            keys = rows.keys if key is None else [key] * count
            plans = jax.device_get(
                plan_batch(
                    self.params,
                    batch,
                    jnp.stack(keys),
                    rows.decisions,
                    np.float32(0),
                    rows.carries,
                    config=self.config.graph,
                )
            )
            rows.take(plans.actions, plans.carry)
        chosen = np.stack([self._interface.act(action) for action in rows.next_actions()])
        return chosen[0] if single else chosen

    def plan(
        self, observation: Mapping[str, Any] | np.ndarray | Observation, *, key: Array | None = None
    ) -> Plan:
        """The whole plan, with a leading axis if there are several observations.

        Its actions are in [-1, 1]. Each observation's key is split from ``key``. What `act` does
        next stays the same.
        """
        batch, single = self._observe(observation)
        keys = jax.random.split(jax.random.key(0) if key is None else key, batch.lead[0])
        plans = _plan_each(self.params, batch, keys, config=self.config.graph)
        return jax.tree.map(lambda x: x[0], plans) if single else plans

    def evaluate(self, *, episodes: int = 100, num_envs: int = 1) -> list[Rollout]:
        """Roll out the first of the 100 fixed episodes (see `valdi_jax.evaluate.evaluate`)."""
        return evaluate(
            self.params, self.config, episodes=episodes, num_envs=num_envs, make=self._make
        )

    def record_video(self, path: Path | str) -> Rollout:
        """Record the first of the fixed episodes (see `valdi_jax.run.video.record_video`)."""
        return record_video(self.params, self.config, path, make=self._make)

    def _observe(self, observation: Any) -> tuple[Observation, bool]:
        """Observations with a leading axis, and whether they had none."""
        if isinstance(observation, Observation):
            single = _fit(observation, self._interface.example)
            return jax.tree.map(lambda x: x[None], observation) if single else observation, single
        if isinstance(observation, Mapping):
            observation = dict(observation)
        # Not a tuple, such as the (observation, info) of reset().
        listed = isinstance(observation, list) and len(observation) > 0
        if listed and all(isinstance(one, Mapping) for one in observation):
            observation = _stacked(observation)
        try:
            count = self._interface.count(observation)
        except ValueError as error:  # what NumPy makes no array of, such as (observation, info)
            kind = type(observation).__name__
            raise UsageError(f"the {kind} is no observation, nor several stacked ones") from error
        each = [observation]
        if count == 0:
            raise UsageError("the observation has a leading axis of no environments")
        if count is not None and isinstance(observation, dict):
            counts = {name: len(x) for name, x in observation.items() if np.ndim(x)}
            if set(counts.values()) != {count}:
                raise UsageError(f"the observation's parts differ in their number: {counts}")
        if count is not None and isinstance(observation, Mapping):
            each = [{name: x[i] for name, x in observation.items()} for i in range(count)]
        elif count is not None:
            each = list(observation)
        try:
            seen = [self._interface.observe(one) for one in each]
        except ValueError as error:
            raise UsageError(f"{error}; agent.make_env() makes the agent's environment") from error
        return jax.tree.map(lambda *x: np.stack(x), *seen), count is None

    def _next_key(self) -> Array:
        self._episodes += 1
        return jax.random.fold_in(jax.random.key(0), self._episodes)


class _Rows:
    """What an agent keeps for each environment that it acts in."""

    def __init__(self, keys: list[Array], config: Config):
        count = len(keys)
        model = config.model
        self.keys = keys
        self.decisions = np.zeros(count, np.int32)
        self.left = np.zeros(count, np.int32)  # actions that remain of the chunk
        self.carries = first_carries(count, config)
        self._chunks = np.zeros((count, model.chunk, model.action_dim), np.float32)

    def begin(self, row: int, key: Array) -> None:
        self.keys[row], self.decisions[row], self.left[row] = key, 0, 0

    def take(self, chunks: np.ndarray, carries: Any) -> None:
        """Take new plans for the rows whose chunks are used up."""
        due = self.left == 0

        def choose(new: np.ndarray, old: np.ndarray) -> np.ndarray:
            return np.where(due.reshape(-1, *[1] * (np.ndim(new) - 1)), new, old)

        self._chunks = choose(chunks, self._chunks)
        self.carries = jax.tree.map(choose, carries, self.carries)
        self.decisions = self.decisions + due
        self.left = np.where(due, chunks.shape[1], self.left)

    def next_actions(self) -> np.ndarray:
        """The next action [B, A] of each chunk."""
        at = self._chunks.shape[1] - self.left
        self.left = self.left - 1
        return self._chunks[np.arange(len(at)), at]


def _stacked(observations: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Several environments' parts, each with a leading axis.

    Raises:
        UsageError: if their names or shapes differ.
    """
    names = sorted(set().union(*observations))
    try:
        return {name: np.stack([one[name] for one in observations]) for name in names}
    except (KeyError, ValueError) as error:
        raise UsageError(f"the {len(observations)} observations differ: {error}") from error


def _fit(observation: Observation, example: Observation) -> bool:
    """Whether an observation is a single one of the example's shape, and not several.

    Raises:
        UsageError: if it is neither.
    """
    for name, ours in example._asdict().items():
        given = getattr(observation, name)
        shape = None if given is None else np.shape(given)
        expected = None if ours is None else ours.shape
        if shape != expected and (shape is None or expected is None or shape[1:] != expected):
            raise UsageError(f"the observation's {name} has the shape {shape}, not {expected}")
    return observation.lead == ()


@functools.partial(jax.jit, static_argnames=("config",))
def _plan_each(params: Params, observations: Observation, keys: Array, *, config: Config) -> Plan:
    return jax.vmap(lambda o, k: planners.plan(params, o, k, config=config))(observations, keys)
