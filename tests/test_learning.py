"""Training on a task that an agent learns in about a minute."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from valdi_jax import planners
from valdi_jax.evaluate import evaluate
from valdi_jax.losses import value
from valdi_jax.presets import PRESETS
from valdi_jax.train import train

# Standing up costs 100 to 250, hanging 1,000 to 1,700. The planner looks 0.15 s ahead, so swinging
# up, which takes ten times as long, has to come from the values.
CONFIG = PRESETS["pendulum"].replace(
    model={
        "horizon": 1,
        "chunk": 3,
        "latent_dim": 16,
        "encoder_width": 64,
        "transformer_width": 64,
        "transformer_depth": 1,
        "transformer_hidden": 128,
        "timestep_dim": 8,
        "mlp_width": 64,
        "mlp_depth": 2,
        "reward_width": 64,
        "reward_depth": 1,
        "value_width": 128,
    },
    planner={"iterations": 3},
    learn={
        "learning_rate": 1e-3,
        "ema_rate": 0.02,
        "sigreg_directions": 64,
        "updates_per_step": 0.75,
    },
    collect={"episodes": 30},
    eval={"every": 0},
    checkpoint={"every": 100},
)


def score(directory, **sections):
    """Mean return of five evaluation episodes after training."""
    config = CONFIG.replace(**sections)
    state = train(config, directory / "run", console=Console(quiet=True))
    returns = [d.episode.episode_return for d in evaluate(state.params, config, episodes=5)]
    return float(np.mean(returns))


@pytest.mark.parametrize("dynamics", ["diffusion", "mlp"])
def test_an_agent_learns_to_swing_a_pendulum_up(tmp_path, dynamics, optimized):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        returned = pool.submit(score, tmp_path, model={"dynamics": dynamics}).result()
    assert returned > -400


def without_bootstrap(monkeypatch):
    def targets(rewards, *_, discount, **__):
        return value.chunk_rewards(rewards, discount=discount)

    monkeypatch.setattr(value, "td_targets", targets)


def without_moving_average(monkeypatch):
    monkeypatch.setattr(optax, "incremental_update", lambda new, old, rate: old)


def with_a_blind_planner(monkeypatch):
    def scores(params, z, actions, noise, **settings):
        return jnp.zeros(actions.shape[:-2])

    monkeypatch.setattr(planners, "predicted_return", scores)


@pytest.mark.slow
@pytest.mark.parametrize("dynamics", ["diffusion", "mlp"])
@pytest.mark.parametrize(
    "broken", [without_bootstrap, without_moving_average, with_a_blind_planner]
)
def test_a_broken_agent_does_not_learn(tmp_path, monkeypatch, broken, dynamics):
    broken(monkeypatch)
    jax.clear_caches()  # drop the programs compiled before the patch
    try:
        assert score(tmp_path, model={"dynamics": dynamics}) < -600
    finally:
        monkeypatch.undo()
        jax.clear_caches()
