"""Does it learn? A task that an agent learns in about a minute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from valdi_jax import planner
from valdi_jax.config import PRESETS
from valdi_jax.evaluate import evaluate
from valdi_jax.train import train

# Standing up costs 100 to 250, hanging 1,000 to 1,700. The planner looks half a second ahead, which
# turned out to be enough to swing up by: the test does not tell whether values are bootstrapped.
CONFIG = PRESETS["pendulum"].replace(
    model={
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
def test_an_agent_learns_to_swing_a_pendulum_up(tmp_path, dynamics):
    assert score(tmp_path, model={"dynamics": dynamics}) > -400


def with_a_blind_planner(monkeypatch):
    def scores(params, z, actions, noise, **settings):
        return jnp.zeros(actions.shape[:-2])

    monkeypatch.setattr(planner, "predicted_return", scores)


@pytest.mark.slow
@pytest.mark.parametrize("dynamics", ["diffusion", "mlp"])
def test_nothing_is_learnt_with_a_blind_planner(tmp_path, monkeypatch, dynamics):
    with_a_blind_planner(monkeypatch)
    jax.clear_caches()  # of what was compiled whole
    try:
        assert score(tmp_path, model={"dynamics": dynamics}) < -500
    finally:
        monkeypatch.undo()
        jax.clear_caches()
