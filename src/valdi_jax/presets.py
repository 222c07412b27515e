"""Named configurations, and the default one of each environment."""

from __future__ import annotations

import dataclasses
from typing import Any

from valdi_jax.config import (
    CheckpointConfig,
    CollectConfig,
    Config,
    DiffuserConfig,
    EnvConfig,
    EvalConfig,
    LearnConfig,
    MBDPOConfig,
    ModelConfig,
    PlanConfig,
    PlannerConfig,
    ReplayConfig,
    UNetConfig,
)
from valdi_jax.errors import UsageError

_PAPER = Config()

# For vector observations: without images, smaller networks learn the same in less time.
_VECTOR = Config(
    env=EnvConfig(name="gym", max_steps=0),
    model=ModelConfig(
        normalize=True,
        latent_dim=32,
        chunk=2,
        encoder_width=128,
        timestep_dim=16,
        transformer_width=128,
        transformer_depth=2,
        transformer_heads=4,
        transformer_hidden=256,
        mlp_width=128,
        mlp_depth=3,
        reward_width=128,
        value_width=256,
    ),
    planner=PlannerConfig(candidates=64, elites=8, iterations=4, answer="mean", shared_noise=True),
    learn=LearnConfig(
        batch_size=64,
        updates_per_step=0.5,
        ema_rate=0.01,
        sigreg_directions=256,
        bootstrap_terminal=False,
        td_encoder="ema",
    ),
    collect=CollectConfig(episodes=200, seed_episodes=5, noise_hold=50, noise_decay=50),
    eval=EvalConfig(every=25),
    checkpoint=CheckpointConfig(every=25),
)

# An episode lasts fifteen decisions if the agent falls, four hundred if it stands. Sampled by
# episode, nearly all segments would be falls, and the agent would never learn to step.
_WALKER = _VECTOR.replace(
    env={"name": "bipedalwalker", "action_repeat": 4},
    model={"chunk": 1},
    learn={"updates_per_step": 1.0, "discount": 0.98, "reward_scale": 0.1},
    collect={"noise_hold": 100, "noise_decay": 100},
    replay={"sampling": "step"},
    eval={"every": 50, "episodes": 10},
)

_Changes = dict[str, dict[str, Any]]  # of a configuration's sections

# TD-MPC2's critics of actions, policy prior and search, on any world model, sized for two cores.
_CRITICS: _Changes = {
    "model": {"networks": ("q", "policy"), "horizon": 3, "chunk": 1, "bins": 101},
    "planner": {
        "kind": "mppi",
        "answer": "sample",
        "candidates": 64,
        "elites": 16,
        "iterations": 6,
        "policy_candidates": 8,
    },
    "learn": {
        "reward_weight": 0.1,
        "value_weight": 0.1,
        "updates_per_step": 1.0,
        "reward_scale": 1.0,
        "td_lambda": 0.0,  # critics learn for the policy's actions, not for those replayed
    },
    # Untrained heads score all sequences alike: the first episodes explore by noise alone.
    "collect": {"seed_noise": 1.0},
}


def _with(changes: _Changes, **further: dict[str, Any]) -> _Changes:
    return {part: changes.get(part, {}) | further.get(part, {}) for part in changes | further}


# The same, and TD-MPC2's world model.
_TDMPC2 = _with(
    _CRITICS,
    model={
        "encoder": "simplex",
        "dynamics": "simplex",
        "normalize": False,
        "latent_dim": 128,
        "encoder_width": 256,
        "mlp_width": 256,
        "reward_width": 256,
        "value_width": 256,
        "dropout": 0.01,
        "rho": 0.5,
    },
    learn={
        "terms": ("dynamics", "reward", "q", "policy"),
        "diffusion_weight": 20.0,
        "max_grad_norm": 20.0,
        "encoder_rate": 0.3,
        "ema_rate": 0.01,
        "target_encoder": "online",
        "td_encoder": "online",
        "last_step": False,
        "average": 0.0,
    },
)

# What another method changes in an environment's own preset.
_METHODS: dict[str, _Changes] = {
    "valdi-q": _with(_CRITICS, learn={"terms": ("dynamics", "reward", "q", "sigreg", "policy")}),
    "tdmpc2": _TDMPC2,
    # MBDPO's search, its energy and a policy prior on Valdi's world model, sized for two cores.
    "mbdpo": {
        "model": {"networks": ("policy", "energy")},
        "planner": {
            "kind": "mbdpo",
            "candidates": 64,
            "elites": 16,
            "policy_candidates": 8,
            "mbdpo": MBDPOConfig(steps=8),
        },
        "learn": {"terms": ("dynamics", "reward", "value", "sigreg", "energy", "policy")},
        "collect": {"seed_noise": 1.0},
    },
    # As MBDPO's authors have it: its search and its energy on TD-MPC2's world model and critics.
    "mbdpo-tdmpc2": _with(
        _TDMPC2,
        model={"networks": ("q", "policy", "energy")},
        planner={"kind": "mbdpo", "answer": "mean", "mbdpo": MBDPOConfig(steps=8)},
        learn={"terms": ("dynamics", "reward", "q", "energy", "policy")},
    ),
    # Diffuser's authors' values for locomotion; on recorded data.
    "diffuser": {
        "model": {
            "networks": ("unet", "plan_value"),
            "normalize": False,
            "horizon": 31,
            "chunk": 1,
        },
        "planner": {"kind": "diffuser", "candidates": 64},
        "learn": {
            "terms": ("plan", "plan_value"),
            "learning_rate": 2e-4,
            "batch_size": 64,
            "mirror": False,
            "random_shift": 0,
            "max_grad_norm": 1e9,
            "ema_rate": 0.005,
            "ema_every": 10,
            "ema_start": 2000,
            "act": "ema",
            "average": 0.0,
            "discount": 0.997,
            "reward_scale": 1.0,
        },
        "collect": {"source": "data", "episodes": 1000},
        "replay": {"sampling": "step"},
        "eval": {"every": 50},
    },
}

PRESETS: dict[str, Config] = {
    # Every value of the paper's Table 3.
    "paper": _PAPER,
    # Learns most in an hour on a CPU: small networks and frames leave time to collect data, and
    # each segment is used more. docs/results.md has the contribution of each part.
    "cpu": dataclasses.replace(
        _PAPER,
        env=EnvConfig(patience=75, downsample=2),
        model=ModelConfig(
            one_step_share=0.5,
            encoder_width=128,
            transformer_width=128,
            transformer_depth=3,
            transformer_heads=4,
            transformer_hidden=256,
            mlp_width=192,
            mlp_depth=3,
            reward_width=128,
            value_width=256,
        ),
        planner=PlannerConfig(
            candidates=64, elites=8, iterations=4, answer="mean", shared_noise=True
        ),
        learn=LearnConfig(
            batch_size=64,
            updates_per_step=0.2,
            ema_rate=0.02,
            sigreg_directions=256,
            td_encoder="ema",
            td_lambda=0.7,
            mirror=True,
            random_shift=2,
        ),
        collect=CollectConfig(episodes=300, noise_hold=100, noise_decay=100),
        replay=ReplayConfig(sampling="step"),
        eval=EvalConfig(every=50),
        checkpoint=CheckpointConfig(every=10),
    ),
    # A smoke test on the real environment: takes about a minute and learns nothing useful.
    "tiny": dataclasses.replace(
        _PAPER,
        env=EnvConfig(max_steps=60),
        model=ModelConfig(
            latent_dim=16,
            encoder_width=32,
            cnn_channels=(4, 8, 8, 8, 16),
            timestep_dim=8,
            transformer_width=64,
            transformer_depth=1,
            transformer_heads=2,
            transformer_hidden=64,
            mlp_width=32,
            mlp_depth=1,
            reward_width=32,
            reward_depth=1,
            value_width=32,
        ),
        planner=PlannerConfig(candidates=16, elites=4, iterations=2),
        learn=LearnConfig(batch_size=8, sigreg_directions=16),
        collect=CollectConfig(episodes=6, seed_episodes=2),
        replay=ReplayConfig(capacity=10),
        eval=EvalConfig(every=3, episodes=1),
        checkpoint=CheckpointConfig(every=3),
    ),
    "gym": _VECTOR,
    "pendulum": _VECTOR.replace(
        env={"name": "pendulum"},
        learn={"reward_scale": 0.1},
        collect={"episodes": 40},
        eval={"every": 20, "episodes": 20},
    ),
    # An action held for ten steps moves the car far enough to find the goal by chance.
    "mountaincar": _VECTOR.replace(
        env={"name": "mountaincar", "action_repeat": 10},
        model={"chunk": 1},
        learn={"updates_per_step": 2.0, "discount": 0.98},
        collect={"episodes": 40},
        eval={"every": 20, "episodes": 20},
    ),
    # A landing counts only after the engines rest for a while, which single steps never explore.
    "lunarlander": _VECTOR.replace(
        env={"name": "lunarlander", "action_repeat": 4},
        model={"chunk": 1},
        learn={"updates_per_step": 2.0, "discount": 0.98, "reward_scale": 0.1},
        collect={"episodes": 100, "noise_decay": 100},
        eval={"every": 50, "episodes": 20},
    ),
    # As TD-MPC2: actions held for two steps, 500 decisions an episode.
    "dmc": _VECTOR.replace(
        env={"name": "dmc:cartpole-swingup", "action_repeat": 2},
        model={"latent_dim": 64},
        learn={"updates_per_step": 0.5, "reward_scale": 0.1, "average": 0.05},
        collect={"episodes": 200, "noise_hold": 20, "noise_decay": 50},
        replay={"capacity": 1000},
        eval={"every": 50, "episodes": 10},
    ),
    "bipedalwalker": _WALKER,
    "bipedalwalker-hardcore": _WALKER.replace(env={"name": "bipedalwalker-hardcore"}),
}
PRESETS |= {name: _VECTOR.replace(**changes) for name, changes in _METHODS.items()}


def _maze(horizon: int, timesteps: int) -> Config:
    """Diffuser's settings of a maze: no value, both ends of a plan pinned."""
    return PRESETS["diffuser"].replace(
        env={"name": "maze:umaze"},
        model={
            "networks": ("unet",),
            "horizon": horizon - 1,
            "unet": UNetConfig(multipliers=(1, 4, 8), timesteps=timesteps, scaler="limits", goal=2),
        },
        planner={
            "candidates": 1,
            "diffuser": DiffuserConfig(clip=True, controller="waypoints"),
        },
        learn={
            "terms": ("plan",),
            "plan": PlanConfig(action_weight=1.0, padding=False),
        },
        collect={"episodes": 2000},
    )


PRESETS |= {
    "maze": _maze(128, 64),
    "maze:medium": _maze(256, 256).replace(env={"name": "maze:medium"}),
    "maze:large": _maze(384, 256).replace(env={"name": "maze:large"}),
}


def default_config(env: str | None, preset: str | None) -> Config:
    """The defaults of a command line, in which either name may be missing.

    Raises:
        UsageError: if the preset is unknown.
    """
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    method = preset in _METHODS and env is not None
    if env is None:
        env = "carracing" if preset is None else PRESETS[preset].env.name
    named = env.removesuffix("-multi")
    named = named if named in PRESETS else named.partition(":")[0]
    suited = PRESETS["paper"] if env == "carracing" else PRESETS.get(named, PRESETS["gym"])
    if suited.diffuses_plans and preset not in (None, "diffuser"):
        suited = PRESETS["gym"]  # a maze's own settings are Diffuser's
    if preset is None or (suited.diffuses_plans and preset == "diffuser"):
        return suited.replace(env={"name": env})
    if method:
        base = PRESETS["cpu"] if env == "carracing" else suited.replace(env={"name": env})
        return base.replace(**_METHODS[preset])
    config = PRESETS[preset]
    if env == config.env.name:
        return config
    if suited is PRESETS["gym"] and config.env.name != "carracing":
        return config.replace(env={"name": env})  # unknown environment: keep the preset's settings
    # The preset's sizes and budgets, with the environment's task settings.
    return config.replace(
        env=dataclasses.asdict(suited.env) | {"name": env},
        model={"normalize": suited.model.normalize, "chunk": suited.model.chunk},
        learn={
            name: getattr(suited.learn, name)
            for name in ("bootstrap_terminal", "reward_scale", "discount", "mirror", "random_shift")
        },
        replay={"sampling": suited.replay.sampling},
    )
