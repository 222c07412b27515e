"""Episodes as a Minari dataset: ``python -m valdi_jax.record minari:pendulum/mine-v0``."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import gymnasium as gym
import numpy as np
import tyro
from rich.progress import track

from valdi_jax import cli, compilation
from valdi_jax.config import EnvConfig
from valdi_jax.data.recorded import metadata_of
from valdi_jax.data.source import sized
from valdi_jax.envs import import_modules, make_env, own_env
from valdi_jax.envs.spaces import Interface
from valdi_jax.errors import UsageError
from valdi_jax.presets import default_config


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line of the recording command."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="minari:ID")]
    """Dataset to write, such as minari:pendulum/mine-v0 (to MINARI_DATASETS_PATH, by default
    ~/.minari/datasets)."""
    agent: Annotated[Path | None, tyro.conf.arg(metavar="AGENT")] = None
    """A run, a checkpoint, an exported agent or a bundled one, which acts in its environment."""
    env: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Environment of random actions, without an agent."""
    replay: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """A run whose replay buffer is written instead, all of it: it mixes what the agent did as it
    learned. Not of images."""
    episodes: int = 100
    """Episodes to record."""
    random: float = 0.0
    """Share of an agent's actions that are replaced by random ones."""
    seed: int = 0
    """Seed of the first episode; the others follow it."""
    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="env.import", metavar="MODULE")] = ()
    """Modules to import first, which register environments, world models, planners or terms."""


class Controller(Protocol):
    """What `record` asks for actions; an `Agent` is one."""

    def reset(self) -> None:
        """Begin an episode."""

    def act(self, observation: Any) -> np.ndarray:
        """The action for an observation of the environment."""


class _Random:
    """Random actions, in place of a share of a controller's."""

    def __init__(
        self, actions: gym.Space, share: float, seed: int, controller: Controller | None = None
    ):
        # Streams of their own: an environment that is reset with the seed draws from a third.
        chosen, drawn = np.random.SeedSequence([3, seed]).spawn(2)
        actions.seed(int(drawn.generate_state(1)[0]))
        self._actions, self._share, self._controller = actions, share, controller
        self._rng = np.random.default_rng(chosen)

    def reset(self) -> None:
        if self._controller is not None:
            self._controller.reset()

    def act(self, observation: Any) -> np.ndarray:
        random = self._actions.sample()
        if self._controller is None:
            return random
        planned = self._controller.act(observation)  # a plan's later actions stay in their places
        return random if self._rng.random() < self._share else planned


def record(
    env: gym.Env,
    controller: Controller,
    name: str,
    *,
    episodes: int,
    seed: int = 0,
    each: Callable[[Any], Any] = lambda numbers: numbers,
    description: str = "",
    env_config: EnvConfig | None = None,
) -> np.ndarray:
    """Record episodes as a local Minari dataset.

    Args:
        env: an environment with a limit on its episodes.
        controller: of the actions.
        name: of the dataset, as Minari writes it: ``namespace/name-v0``.
        episodes: to record.
        seed: of the first episode's reset; the others follow it.
        each: wraps the episodes' numbers, e.g. in a progress bar.
        description: of the controller, kept with the data.
        env_config: of the environment: training on the data takes its name and settings from
            them. Without it, the environment's Gymnasium id.

    Ctrl-C ends the recording after the step under way, which its episode ends with. An error of the
    environment or the controller ends it likewise, and is raised once the data are written.

    Returns: the episodes' returns, fewer than ``episodes`` after Ctrl-C.

    Raises:
        UsageError: if Minari is missing, the name is not one of its, or taken.
    """
    minari = _minari()
    _check_name(name)
    try:
        _ = env.spec and env.spec.to_json()  # data keep it
    except ValueError as error:
        raise UsageError(
            f"Minari cannot keep how the environment is made ({error}): register it as "
            "'module:Class'"
        ) from error
    # Minari's default stores frames as JPEG, and training would see others than the agent does.
    collector = minari.DataCollector(env, data_format="hdf5", jpeg_encoding=False)
    returns: list[float] = []
    failure: Exception | None = None
    # A signal waits for the collector, which may be writing an episode.
    with cli.interruptible() as check:
        try:
            for number in each(range(episodes)):
                controller.reset()
                observation, _ = collector.reset(seed=seed + number)
                over, total = False, 0.0
                while not over:
                    check()
                    action = controller.act(observation)
                    observation, reward, terminated, truncated, _ = collector.step(action)
                    total += float(reward)
                    returns[number:] = [total]
                    over = terminated or truncated
        except (KeyboardInterrupt, cli.Interrupted):  # keep what there is
            pass
        except Exception as error:
            failure = error
    if not returns:
        raise failure or KeyboardInterrupt
    with _whole(name):
        dataset = collector.create_dataset(
            name,
            algorithm_name=description or type(controller).__name__,
            description=f"recorded by valdi_jax.record: {description}",
            # Without reference scores: for them, Minari makes the environment anew by its name.
        )
        if env_config is not None:
            dataset.storage.update_metadata(metadata_of(env_config))
    collector.close()
    if failure is not None:
        failure.add_note(f"minari:{name} keeps the {len(returns)} episodes until then")
        raise failure
    return np.array(returns)


def write_replay(run: Path, name: str) -> np.ndarray:
    """Write the replay buffer of a run (its newest checkpoint) as a local Minari dataset.

    Returns: the episodes' returns.

    Raises:
        UsageError: if there is no such run or none of its episodes, if they have images, if Minari
            is missing, or the name is not one of its, or taken.
    """
    minari = _minari()
    from minari.data_collector import EpisodeBuffer

    from valdi_jax.run import checkpoint, npz, rundir, stored

    _check_name(name)
    agent = stored.open_agent(run)  # its name is that of the newest checkpoint
    directory, newest = rundir.locate(Path(agent.name))
    if newest is None:
        raise UsageError(f"{run} is no run: it has no replay buffer")
    if agent.made_by:
        raise UsageError(f"{run} was trained on environments that {agent.made_by} makes")
    if damage := checkpoint.verify(newest):
        raise UsageError(damage[0])
    config = agent.config
    with contextlib.closing(own_env(make_env, config.env, training=True)) as env:
        spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    interface = Interface(*spaces.values())
    if interface.example.image is not None:
        raise UsageError(f"{run} sees images: only a replay of vectors can be written")
    if config.frame_stride > 1:
        raise UsageError(f"{run} stores an observation a chunk: --env.render-every step stores all")
    config = sized(config, interface)
    buffers: list[EpisodeBuffer] = []
    returns = []
    for number in checkpoint.replay_digests(newest):
        episode = npz.load_episode(directory, number, interface.example, config)
        last = np.arange(len(episode)) == len(episode) - 1
        buffers.append(
            EpisodeBuffer(
                id=len(buffers),
                seed=episode.seed,
                observations=interface.unobserve(episode.observations.vector),
                actions=np.stack([interface.act(action) for action in episode.actions]),
                rewards=episode.rewards.astype(np.float64),
                terminations=last & episode.terminated,
                truncations=last & episode.truncated,
            )
        )
        returns.append(episode.episode_return)
    if not buffers:
        raise UsageError(f"the replay buffer of {run} is empty")
    source = f"replay of {directory.resolve().name}"
    with _whole(name):
        dataset = minari.create_dataset_from_buffers(
            name,
            buffers,
            **spaces,
            algorithm_name=source,
            description=f"recorded by valdi_jax.record: {source}",
            data_format="hdf5",
        )
        dataset.storage.update_metadata(metadata_of(config.env))
    return np.array(returns)


@contextlib.contextmanager
def _whole(name: str) -> Iterator[None]:
    """Write a dataset, or leave nothing of it."""
    _check_name(name)  # again: another process may have taken it meanwhile, whose data stay
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # author, address: for datasets to publish
            yield
    except BaseException:
        shutil.rmtree(_root() / name, ignore_errors=True)
        raise


def _check_name(name: str) -> None:
    """Raises UsageError if a dataset cannot have this name."""
    from minari.dataset.minari_dataset import parse_dataset_id

    try:
        parse_dataset_id(name)  # a folder of another name would break Minari's listing of them all
        named = re.search(r"-v\d+$", name) is not None
    except (ValueError, TypeError):
        named = False
    if not named:
        raise UsageError(
            f"minari:{name} is no name of a dataset, such as minari:pendulum/mine-v0 (folders have "
            "two letters or more)"
        )
    if (_root() / name).exists():
        raise UsageError(f"minari:{name} exists already in {_root()}: give another name")


def _root() -> Path:
    """Where Minari keeps its datasets."""
    return Path(os.environ.get("MINARI_DATASETS_PATH", Path.home() / ".minari" / "datasets"))


def _minari() -> Any:
    try:
        import minari
    except ImportError as error:
        raise UsageError(
            "recording needs the extra offline: pip install 'valdi-jax[offline]'"
        ) from error
    return minari


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    arguments = cli.parse(
        Arguments,
        argv,
        prog="python -m valdi_jax.record",
        description="Record episodes as a Minari dataset.",
    )
    kind, _, name = arguments.data.partition(":")
    if kind != "minari" or not name:
        raise UsageError(f"{arguments.data!r} is not minari:ID")
    if not 0 <= arguments.random <= 1:
        raise UsageError(f"--random is {arguments.random}; it must be between 0 and 1")
    if not 0 <= arguments.seed < 2**31 - arguments.episodes:
        raise UsageError(f"--seed is {arguments.seed}; it must be from 0 to 2^31")
    if arguments.random and arguments.agent is None:
        raise UsageError("--random is of an agent's actions: without one, all are random")
    if arguments.episodes < 1:
        raise UsageError(f"--episodes is {arguments.episodes}; it must be above 0")
    given = [arguments.agent, arguments.env, arguments.replay]
    if given.count(None) != 2:
        raise UsageError("give one of --agent, --replay, or --env for random actions")
    _minari()
    import_modules(arguments.imports)
    if arguments.replay is not None:
        _say(name, write_replay(arguments.replay, name))
        return 0
    compilation.cache_compilations()
    agent = None
    if arguments.agent is None:
        config = default_config(arguments.env, None)
        env = own_env(make_env, config.env, training=False)
    else:
        from valdi_jax.agent import Agent

        agent = Agent.load(arguments.agent)
        config = agent.config
        env = agent.make_env()
    share = arguments.random if agent is not None else 1.0
    what = "random actions" if agent is None else f"{arguments.agent}, {share:.0%} random"
    returns = record(
        env,
        _Random(env.action_space, share, arguments.seed, agent),
        name,
        episodes=arguments.episodes,
        seed=arguments.seed,
        each=lambda numbers: track(numbers, description="recording", transient=True),
        description=what,
        env_config=config.env,
    )
    _say(name, returns)
    if len(returns) < arguments.episodes:
        print(f"stopped after {len(returns)} of {arguments.episodes} episodes", file=sys.stderr)
        return 130
    return 0


def _say(name: str, returns: np.ndarray) -> None:
    print(
        f"minari:{name}: {len(returns)} episodes, mean return {returns.mean():.1f}, "
        f"standard deviation {returns.std():.1f}, in {_root()}"
    )


def command() -> None:
    """Run the console script."""
    cli.run(main)


if __name__ == "__main__":
    command()
