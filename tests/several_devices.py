"""Checks on several devices; test_devices.py runs them in a process that has eight."""

import io
import sys
from pathlib import Path

import chex
import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from test_update import EXAMPLE, random_batch
from toy import CONFIG, make_counting

from valdi_jax.data.rollout import plan_batch
from valdi_jax.run import rundir
from valdi_jax.train import train
from valdi_jax.updates import init_state, shardings, update


def losses_agree_with_one_device():
    whole, split = shardings(8, 8)
    one = init_state(jax.random.key(0), EXAMPLE, config=CONFIG)
    eight = jax.device_put(init_state(jax.random.key(0), EXAMPLE, config=CONFIG), whole)
    for number in range(3):
        batch = random_batch(number)  # as many segments as in training: the same program
        shared = jax.device_put(batch, split)
        assert len(shared.rewards.sharding.device_set) == 8
        eight, theirs = update(eight, shared, config=CONFIG)
        one, ours = update(one, batch, config=CONFIG)
        for name, value in ours.items():
            np.testing.assert_allclose(theirs[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    chex.assert_trees_all_close(one.params, eight.params, atol=1e-5)


def devices_share_the_candidates_of_a_plan():
    params = init_state(jax.random.key(0), EXAMPLE, config=CONFIG).params
    keys = jax.random.split(jax.random.key(1), 2)
    observations = jax.tree.map(lambda x: np.stack([x] * 2), EXAMPLE)
    settings = {"config": CONFIG.graph}
    one = (params, observations, keys, np.zeros(2, np.int32), np.float32(0.1))
    alone = plan_batch.lower(*one, **settings).compile()
    automatic = Mesh(np.array(jax.devices()), ("devices",))  # as in training
    for mesh in (automatic, jax.make_mesh((8,), ("devices",))):  # with explicit axes
        with jax.set_mesh(mesh):
            shared = plan_batch.lower(*one, **settings).compile()
            theirs = plan_batch(*one, **settings)
        chex.assert_trees_all_close(alone(*one), theirs, atol=1e-5)
        # Operations per device; the encoder is not shared.
        assert shared.cost_analysis()["flops"] < 0.5 * alone.cost_analysis()["flops"]


def a_checkpoint_of_one_device_goes_on(directory, episodes):
    # All devices learn if requested; by default, parts of a CPU only plan.
    for devices, sentence in ((8, "learning on 8"), (0, "learning on 1")):
        output = io.StringIO()
        config = CONFIG.replace(collect={"episodes": episodes}, learn={"devices": devices})
        state = train(
            config, directory, resume=True, make=make_counting, console=Console(file=output)
        )
        assert f"planning on 8 devices, {sentence}" in output.getvalue()
        assert len(jax.tree.leaves(state.params)[0].sharding.device_set) == (devices or 1)
        assert int(rundir.latest(directory).name) == episodes
        episodes += 1


if __name__ == "__main__":
    assert jax.device_count() == 8
    losses_agree_with_one_device()
    devices_share_the_candidates_of_a_plan()
    a_checkpoint_of_one_device_goes_on(Path(sys.argv[1]), int(sys.argv[2]))
    print("all of it held")
