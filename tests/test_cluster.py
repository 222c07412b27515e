"""Collecting with Ray. All of it but the first test needs the extra ray."""

import builtins
import functools
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from toy import CONFIG, Counting

from valdi_jax.errors import StoppedError, UsageError
from valdi_jax.run import rundir
from valdi_jax.run.manifest import MANIFEST, read_signed
from valdi_jax.train import train

BASE = CONFIG.replace(
    collect={"episodes": 8, "episodes_per_round": 4, "lag": 1},
    eval={"every": 0},
    checkpoint={"every": 4, "keep": 9},
)


def make_counting(config, *, training, **settings):
    return Counting(max_steps=config.max_steps, **settings)


def go(directory, config=BASE, make=make_counting, **settings):
    """The checksums of the checkpoints of a run, and what it said."""
    said = io.StringIO()
    train(config, directory, make=make, console=Console(file=said, width=200), **settings)
    found = rundir.checkpoints(directory)
    return [read_signed(path / MANIFEST)["content"] for path in found], said.getvalue()


def test_without_ray_the_option_says_how_to_install_it(tmp_path, monkeypatch):
    def missing(name, *args, **kwargs):
        if name == "ray" or name.startswith("ray."):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.delitem(sys.modules, "valdi_jax.data.cluster", raising=False)
    with pytest.raises(UsageError, match=r"pip install 'valdi-jax\[ray\]'"):
        go(tmp_path / "run", BASE.replace(collect={"cluster": "local"}))


@pytest.fixture(scope="module")
def cluster():
    """A head with four places for actors, and a function that adds a node with two more."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # Its processes find this module.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    address = {"node_ip_address": "127.0.0.2", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**address, "num_cpus": 4})
    ray.init(address=cluster.address, _node_ip_address="127.0.0.2", log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return go(tmp_path_factory.mktemp("local") / "run")[0]


@pytest.mark.parametrize("actors", [1, 2, 3])
def test_any_number_of_actors_gives_the_run_of_one_process(cluster, local, tmp_path, actors):
    config = BASE.replace(collect={"cluster": cluster.address, "actors": actors})
    assert go(tmp_path / "run", config)[0] == local


@pytest.mark.parametrize("lag", [0, 2])
def test_actors_with_several_environments_give_that_run_too(cluster, tmp_path, lag):
    # Planned for in batches of four, or with a lag in two groups of two.
    config = BASE.replace(collect={"num_envs": 4, "lag": lag, "episodes_per_round": 6})
    alone, _ = go(tmp_path / "alone", config)
    config = config.replace(collect={"cluster": cluster.address, "actors": 2})
    assert go(tmp_path / "run", config)[0] == alone


class Killing(Counting):
    """Kills its process at its fifth step: always, or once a file exists, which it deletes."""

    def __init__(self, once=None, **settings):
        super().__init__(**settings)
        self.once = once

    def step(self, action):
        if self.steps == 4 and (not self.once or self._first()):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)

    def _first(self):
        try:
            Path(self.once).unlink()  # by one process alone
        except FileNotFoundError:
            return False
        return True


def make_killing(config, *, training, **settings):
    return Killing(max_steps=config.max_steps, **settings)


def test_a_lost_actor_and_a_lost_node_leave_the_run_as_it_is(cluster, local, tmp_path):
    node = cluster.add_node(num_cpus=2, node_ip_address="127.0.0.3")
    cluster.wait_for_nodes()
    removed = []

    def remove(record):
        if not removed:
            removed.append(cluster.remove_node(node, allow_graceful=False))
            (tmp_path / "kill").touch()

    config = BASE.replace(collect={"cluster": cluster.address, "actors": 2})
    make = functools.partial(make_killing, once=str(tmp_path / "kill"))
    contents, said = go(tmp_path / "run", config, make, on_record=remove)
    assert sum(int(count) for count in re.findall(r"collectors lost: (\d+)", said)) == 2
    assert contents == local


def test_fewer_machines_than_actors_go_on_with_those_that_are_left(cluster, local, tmp_path):
    node = cluster.add_node(num_cpus=2, node_ip_address="127.0.0.4")
    cluster.wait_for_nodes()
    removed = []

    def remove(record):
        if not removed:
            removed.append(cluster.remove_node(node, allow_graceful=False))

    config = BASE.replace(collect={"cluster": cluster.address, "actors": 6})
    assert go(tmp_path / "run", config, on_record=remove)[0] == local


def test_an_environment_that_kills_every_actor_stops_the_run(cluster, tmp_path):
    config = BASE.replace(collect={"cluster": cluster.address, "episodes_per_round": 1})
    with pytest.raises(StoppedError, match="lost their collector 5 times"):
        go(tmp_path / "run", config, make_killing)


def make_failing(config, *, training):
    return Counting(max_steps=config.max_steps, fail_at=5)


def test_an_environments_own_error_is_raised_with_its_traceback(cluster, tmp_path):
    config = BASE.replace(collect={"cluster": cluster.address})
    with pytest.raises(RuntimeError, match="the road is closed"):
        go(tmp_path / "run", config, make_failing)


def test_more_actors_than_the_cluster_holds_are_refused(cluster, tmp_path):
    config = BASE.replace(collect={"cluster": cluster.address, "actors": 99})
    with pytest.raises(UsageError, match=r"--collect.actors is 99; the cluster has \d+ CPUs"):
        go(tmp_path / "run", config)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere"])
def test_a_cluster_that_cannot_be_reached_is_named(tmp_path, address):
    ray = pytest.importorskip("ray")
    from valdi_jax.data.cluster import RayCollector

    if ray.is_initialized():
        ray.shutdown()
    with pytest.raises(UsageError, match=f"--collect.cluster {address}: "):
        RayCollector(BASE.replace(collect={"cluster": address}).collect, lambda: None)


PROGRAM = """
import sys
from pathlib import Path
from rich.console import Console
from test_cluster import BASE, make_counting
from valdi_jax import cli
from valdi_jax.train import train

config = BASE.replace(collect={"cluster": "local", "actors": 2, "lag": 2}, checkpoint={"every": 1})
run = Path(sys.argv[1])
try:
    resume = (run / "config.json").exists()
    train(config, run, make=make_counting, resume=resume, console=Console(width=200))
except cli.Interrupted:
    sys.exit(130)
"""


def start(directory):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", PROGRAM, str(directory)]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_episode(program, number):
    for line in program.stdout:
        if line.startswith(f"episode {number}/"):
            return
    raise AssertionError(program.wait())


@pytest.mark.parametrize(
    ("send", "signum", "status"),
    [
        (os.killpg, signal.SIGKILL, -9),
        (os.killpg, signal.SIGUSR1, 130),  # as Slurm does: also to Ray's processes
        (os.kill, signal.SIGTERM, 130),
    ],
)
def test_a_driver_that_is_ended_goes_on_as_if_it_had_not_been(tmp_path, send, signum, status):
    pytest.importorskip("ray")
    program = start(tmp_path / "run")
    wait_for_episode(program, 4)
    send(program.pid, signum)
    said, _ = program.communicate(timeout=60)
    assert program.returncode == status, said
    assert start(tmp_path / "run").wait(timeout=120) == 0
    expected, _ = go(tmp_path / "local", BASE.replace(collect={"lag": 2}))
    newest = rundir.checkpoints(tmp_path / "run")[-1]
    assert read_signed(newest / MANIFEST)["content"] == expected[-1]
