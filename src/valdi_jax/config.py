"""Typed, hashable configuration and its named presets.

Every field is a command-line option (``--planner.candidates 128``). Configurations are frozen and
hashable, so that a jitted function takes one as a static argument.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from valdi_jax.errors import UsageError


@dataclass(frozen=True)
class EnvConfig:
    """The environment."""

    name: Annotated[str, tyro.conf.arg(name="env", prefix_name=False, metavar="NAME")] = "carracing"
    """Environment to train on: carracing, pendulum, mountaincar, lunarlander, bipedalwalker,
    bipedalwalker-hardcore, or gym:ID for any that is registered with Gymnasium."""
    max_steps: int = 600
    """Environment steps after which an episode is truncated; 0 for the environment's own limit."""
    action_repeat: int = 1
    """Environment steps that an action is held for: one step to the agent, with the sum of their
    rewards. Every other option and figure counts such holds, --env.max-steps alone does not."""
    patience: int = 0
    """Truncate a training episode after this many environment steps without a positive reward
    (CarRacing: without a new tile). 0 never does. Evaluation ignores it."""
    render_every: Literal["step", "chunk"] = "step"
    """Keep the observation after every step, or only that which the planner sees after each chunk:
    faster to draw and a third to store, but training segments then start at decisions only."""
    downsample: int = 1
    """CarRacing: side of the pixel blocks that a frame is averaged over; 2 makes frames 48 x 48."""


@dataclass(frozen=True)
class ModelConfig:
    """The networks (paper, Supp. B)."""

    dynamics: Literal["diffusion", "mlp"] = "diffusion"
    """World model: the diffusion transformer, or the deterministic one-step MLP baseline."""
    latent_dim: int = 64
    """Size D of the latent."""
    horizon: int = 5
    """World-model steps H that are imagined."""
    chunk: int = 3
    """Environment steps C in one world-model step."""
    action_dim: tyro.conf.Suppress[int] = 3
    """Action size A; training takes it from the environment."""
    normalize: bool = False
    """Normalise vector observations by their running mean and variance."""
    encoder_width: int = 256
    """Width of each modality's embedding."""
    cnn_channels: tuple[int, ...] = (16, 32, 64, 128, 256)
    """Channels of the convolutions: the first, three that halve (the third is repeated for images
    that need more), and the last."""
    diffusion_timesteps: int = 1000
    """Diffusion timesteps T of the noise schedule."""
    timestep_dim: int = 32
    """Size of the learned timestep embedding."""
    transformer_width: int = 256
    """Width of the diffusion transformer."""
    transformer_depth: int = 6
    """Blocks of the diffusion transformer."""
    transformer_heads: int = 8
    """Attention heads."""
    transformer_hidden: int = 512
    """Hidden width of a transformer block's feed-forward network."""
    mlp_width: int = 384
    """Width of the MLP dynamics."""
    mlp_depth: int = 6
    """Residual blocks of the MLP dynamics."""
    reward_width: int = 256
    """Width of the reward head."""
    reward_depth: int = 2
    """Residual blocks of the reward head."""
    value_width: int = 512
    """Hidden width of a value head."""
    value_heads: int = 2
    """Value heads E, of which the minimum is the value."""


@dataclass(frozen=True)
class PlannerConfig:
    """The cross-entropy method (paper, Supp. D)."""

    candidates: int = 512
    """Action sequences N sampled in each iteration."""
    elites: int = 64
    """Best sequences K that the next mean and standard deviation come from."""
    iterations: int = 10
    """CEM iterations I."""
    diffusion_steps: int = 1
    """DDIM steps for each imagined trajectory."""
    answer: Literal["best", "mean"] = "best"
    """Answer with the best sequence seen over all iterations, or with the final elite mean."""
    action_hold: int = 1
    """Environment steps for which candidates and exploration noise hold an action; it divides
    --model.chunk."""
    correlation: float = 0.0
    """Correlation, within a plan, of the noise of candidates and of exploration from one held
    action to the next."""
    warm_start: bool = False
    """Start the search at the mean of the plan before, moved on by the chunk that was executed,
    rather than at zero."""
    shared_noise: bool = False
    """Start every candidate of a plan from one noise draw, rather than each from its own."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Numbers that candidates are imagined and scored in; the encoder stays in float32."""


@dataclass(frozen=True)
class LearnConfig:
    """The objective and the optimizer (paper, Supp. C and Table 3)."""

    batch_size: int = 256
    """Segments B in a batch."""
    updates_per_step: float = 0.1
    """Updates for each environment step collected; 0.1 is 60 for a full CarRacing episode."""
    learning_rate: float = 3e-4
    """Adam's learning rate."""
    adam_b1: float = 0.9
    """Adam's first-moment decay."""
    adam_b2: float = 0.999
    """Adam's second-moment decay."""
    max_grad_norm: float = 10.0
    """Global gradient norm to clip at."""
    ema_rate: float = 0.005
    """Share of the online parameters that enters the moving average after each update."""
    discount: float = 0.99
    """Discount per environment step."""
    diffusion_weight: float = 1.0
    """Weight of the dynamics loss."""
    reward_weight: float = 0.01
    """Weight of the reward loss."""
    value_weight: float = 0.01
    """Weight of the temporal-difference loss."""
    sigreg_weight: float = 0.05
    """Weight of SIGReg; one minus it weights all the rest."""
    sigreg_directions: int = 1024
    """Random directions that SIGReg projects on."""
    sigreg_knots: int = 17
    """Points at which the characteristic functions are compared."""
    bootstrap_terminal: bool = True
    """Bootstrap the TD target through a terminal step, as the reference does."""
    reward_scale: float = 1.0
    """Factor on the rewards that the heads learn from; it changes no reported return."""
    updates_per_dispatch: int = 8
    """Updates made in one call, at most, where the replay is on the device."""
    devices: int = 0
    """Devices that share an update; 0 for all accelerators that there are, and one where devices
    are only parts of a CPU, which an update fills by itself."""
    nonfinite_limit: int = 10
    """Updates in a row with a loss or gradient that is not finite, or planner answers likewise,
    after which training stops."""
    td_encoder: Literal["online", "ema"] = "online"
    """Encoder whose latents the TD target is taken at (the reference: online)."""
    td_lambda: float = 0.0
    """Weight of longer returns in the TD target, up to the end of the segment: TD(lambda), without
    a correction for older policies. 0 is the reference's one-step target."""
    mirror: bool = False
    """CarRacing: exchange left and right in half of the training segments."""
    random_shift: int = 0
    """Shift the frames of each training segment by up to this many pixels each way, all alike."""


@dataclass(frozen=True)
class CollectConfig:
    """How experience is collected."""

    episodes: int = 5000
    """Training episodes, the seed episodes included."""
    seed_episodes: int = 10
    """Episodes driven by the untrained planner before the first update."""
    num_envs: int = 1
    """Environments stepped in parallel, each in a worker process when there are several."""
    overlap: Annotated[bool, tyro.conf.arg(prefix_name=False)] = False
    """Drive the next episodes while learning from those before, with parameters that lack these
    updates. The updates per environment step stay the same."""
    worker_timeout: float = 60.0
    """Seconds after which a worker process that does not answer is replaced by a new one."""
    noise_start: float = 0.25
    """Standard deviation of the exploration noise at first, added before tanh."""
    noise_end: float = 0.05
    """Standard deviation of the exploration noise after the decay."""
    noise_hold: int = 250
    """Episodes at the first noise level, counted after the seed episodes."""
    noise_decay: int = 250
    """Episodes over which the noise then falls linearly."""


@dataclass(frozen=True)
class ReplayConfig:
    """The replay buffer."""

    capacity: int = 1000
    """Episodes kept; the oldest goes first."""
    sampling: Literal["episode", "step"] = "episode"
    """Draw training segments evenly from the episodes, as the reference does, or from the steps in
    all of them, so that a long episode counts for as many short ones as it has their steps."""
    placement: Literal["auto", "device", "host"] = "auto"
    """Where training segments are gathered: from a copy of the episodes on the device, several
    updates in one call, or on the host. auto: on an accelerator, if they fit and --env.max-steps
    says how long they can be."""


@dataclass(frozen=True)
class EvalConfig:
    """Periodic evaluation, always on the same episodes."""

    every: int = 250
    """Training episodes between evaluations; 0 for none."""
    episodes: int = 5
    """Episodes of each evaluation: the first of 100 fixed reset seeds (CarRacing: tracks)."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints."""

    every: int = 25
    """Episodes between checkpoints; one is always written at the end and on Ctrl-C."""
    keep: int = 2
    """Checkpoints kept; older ones are deleted."""


@dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

    env: EnvConfig = field(default_factory=EnvConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    learn: LearnConfig = field(default_factory=LearnConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    seed: int = 0
    """Seed that everything random in the run follows from."""

    def replace(self, **sections: dict[str, Any]) -> Config:
        """A configuration that differs in some fields: ``config.replace(model={"chunk": 2})``.

        Raises:
            TypeError: if there is no such field.
        """
        return dataclasses.replace(
            self,
            **{
                name: dataclasses.replace(getattr(self, name), **fields)
                for name, fields in sections.items()
            },
        )

    @property
    def plan_shape(self) -> tuple[int, int]:
        """Shape ``[H * C, A]`` of a planned action sequence."""
        return self.model.horizon * self.model.chunk, self.model.action_dim

    @property
    def search_shape(self) -> tuple[int, int]:
        """Shape ``[H * C / hold, A]`` of what the planner searches: one action a hold."""
        steps, size = self.plan_shape
        return steps // self.planner.action_hold, size

    @property
    def frame_stride(self) -> int:
        """Environment steps between the observations that are kept."""
        return self.model.chunk if self.env.render_every == "chunk" else 1

    @property
    def episode_steps(self) -> int:
        """Steps that an episode can have at most, 0 where only the environment knows."""
        return -(-self.env.max_steps // self.env.action_repeat)

    @property
    def segment_steps(self) -> int:
        """Environment steps that a training segment spans: (H + 1) * C."""
        return (self.model.horizon + 1) * self.model.chunk


_PAPER = Config()

# For tasks seen as a vector: no images, so smaller networks learn the same in less time.
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

# Its falls are over in fifteen decisions, standing lasts four hundred: by episode, nearly all that
# is learnt from would be falls, and it never dares a step.
_WALKER = _VECTOR.replace(
    env={"name": "bipedalwalker", "action_repeat": 4},
    model={"chunk": 1},
    learn={"updates_per_step": 1.0, "discount": 0.98, "reward_scale": 0.1},
    collect={"noise_hold": 100, "noise_decay": 100},
    replay={"sampling": "step"},
    eval={"every": 50, "episodes": 10},
)


PRESETS: dict[str, Config] = {
    # Every value of Table 3 of the paper.
    "paper": _PAPER,
    # What learns most for an hour of a CPU: small networks on small frames leave time for data, and
    # more is made of each segment; docs/results.md has what each part of it was worth.
    "cpu": dataclasses.replace(
        _PAPER,
        env=EnvConfig(patience=75, downsample=2),
        model=ModelConfig(
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
    # A smoke run on the real environment: over in about a minute, learns nothing worth having.
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
    # A landing counts once the engines have rested for a while, which single steps never try.
    "lunarlander": _VECTOR.replace(
        env={"name": "lunarlander", "action_repeat": 4},
        model={"chunk": 1},
        learn={"updates_per_step": 2.0, "discount": 0.98, "reward_scale": 0.1},
        collect={"episodes": 100, "noise_decay": 100},
        eval={"every": 50, "episodes": 20},
    ),
    "bipedalwalker": _WALKER,
    "bipedalwalker-hardcore": _WALKER.replace(env={"name": "bipedalwalker-hardcore"}),
}


def default_config(env: str | None, preset: str | None) -> Config:
    """The configuration that a command line starts from.

    Args:
        env: name of the environment, ``None`` for that of the preset.
        preset: name of the preset, ``None`` for that which suits the environment.

    Raises:
        UsageError: if there is no such preset.
    """
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    if env is None and preset is None:
        env = "carracing"
    suited = PRESETS["paper"] if env == "carracing" else PRESETS.get(env, PRESETS["gym"])
    if preset is None:
        return suited.replace(env={"name": env})
    config = PRESETS[preset]
    if env is None or env == config.env.name:
        return config
    if suited is PRESETS["gym"] and config.env.name != "carracing":
        return config.replace(env={"name": env})  # nothing is known of it: like the preset's own
    # The sizes and budgets of the preset, with what the environment asks for.
    return config.replace(
        env=dataclasses.asdict(suited.env) | {"name": env},
        model={"normalize": suited.model.normalize, "chunk": suited.model.chunk},
        learn={
            name: getattr(suited.learn, name)
            for name in ("bootstrap_terminal", "reward_scale", "discount", "mirror", "random_shift")
        },
        replay={"sampling": suited.replay.sampling},
    )


def validate(config: Config) -> None:
    """Check what the types alone do not.

    Raises:
        UsageError: naming the first field that is out of range.
    """
    model = config.model
    counts = [f"model.{f.name}" for f in dataclasses.fields(model) if type(f.default) is int]
    counts += ["planner.candidates", "planner.iterations"]
    counts += ["planner.diffusion_steps", "learn.batch_size", "learn.sigreg_directions"]
    counts += ["collect.episodes", "collect.num_envs", "replay.capacity", "eval.episodes"]
    counts += ["learn.nonfinite_limit", "learn.updates_per_dispatch"]
    counts += ["checkpoint.every", "checkpoint.keep"]
    least = dict.fromkeys(counts, 1) | {"planner.elites": 2, "learn.sigreg_knots": 2}
    if config.env.max_steps:  # or no episode holds a training segment
        least["env.max_steps"] = (config.segment_steps - 1) * config.env.action_repeat + 1
    least |= {f"collect.{name}": 0 for name in ("seed_episodes", "noise_hold", "noise_decay")}
    least.setdefault("env.max_steps", 0)
    least |= {"env.action_repeat": 1, "env.patience": 0, "eval.every": 0, "seed": 0}
    least |= {"env.downsample": 1, "planner.action_hold": 1, "planner.correlation": 0}
    least |= {"learn.td_lambda": 0, "learn.random_shift": 0}
    least |= {"learn.updates_per_step": 0, "learn.devices": 0}
    least |= {"collect.noise_start": 0, "collect.noise_end": 0}
    least |= {f"learn.{name}_weight": 0 for name in ("diffusion", "reward", "value", "sigreg")}
    most = {
        "planner.elites": config.planner.candidates,
        "planner.correlation": 1,
        "learn.td_lambda": 1,
        "planner.diffusion_steps": model.diffusion_timesteps,
        "eval.episodes": 100,
        "learn.sigreg_weight": 1,
    }
    shares = ("learning_rate", "ema_rate", "discount", "adam_b1", "adam_b2")
    for name, value in _leaves(to_dict(config)):
        option = "--" + name.replace("_", "-")
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{option} is {value}; it must be a finite number")
        if name in least and value < least[name]:
            raise UsageError(f"{option} is {value}; it must be at least {least[name]}")
        if name in most and value > most[name]:
            raise UsageError(f"{option} is {value}; it must be at most {most[name]}")
        if name.removeprefix("learn.") in shares and not 0 < value <= 1:
            raise UsageError(f"{option} is {value}; it must be above 0 and at most 1")
    positive = {
        "learn.max-grad-norm": config.learn.max_grad_norm,
        "learn.reward-scale": config.learn.reward_scale,
        "collect.worker-timeout": config.collect.worker_timeout,
    }
    for name, value in positive.items():
        if not value > 0:
            raise UsageError(f"--{name} is {value}; it must be above 0")
    if len(model.cnn_channels) != 5 or min(model.cnn_channels) < 1:
        raise UsageError(
            f"--model.cnn-channels is {model.cnn_channels}; it must be five numbers above 0"
        )
    if model.chunk % config.planner.action_hold:
        raise UsageError(
            f"--planner.action-hold is {config.planner.action_hold}; it must divide "
            f"--model.chunk ({model.chunk})"
        )
    if config.env.name != "carracing" and (config.env.downsample > 1 or config.learn.mirror):
        option = "--learn.mirror" if config.learn.mirror else "--env.downsample"
        raise UsageError(f"{option} is for carracing alone, not for {config.env.name}")
    if 96 % config.env.downsample:
        raise UsageError(f"--env.downsample is {config.env.downsample}; it must divide 96")
    if model.dynamics == "mlp":
        return
    if model.transformer_width % model.transformer_heads:
        raise UsageError(
            f"--model.transformer-width is {model.transformer_width}; it must be a multiple of "
            f"--model.transformer-heads ({model.transformer_heads})"
        )
    token = model.timestep_dim + model.chunk * model.action_dim + model.latent_dim + 1
    if model.transformer_width < token:
        raise UsageError(
            f"--model.transformer-width is {model.transformer_width}; it must be at least {token}, "
            "the sizes of a timestep, an action chunk and a latent, and one for the marker"
        )


def _leaves(data: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield path + name, value


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain JSON data."""
    return dataclasses.asdict(config)


def from_dict(data: Any, cls: type = Config, path: str = "", *, complete: bool = True) -> Any:
    """A configuration from plain JSON data, strictly.

    Args:
        data: an object of objects.
        cls: dataclass to make of it.
        path: of the object within the configuration.
        complete: whether no field may be missing; otherwise those take their defaults, which for
            options that were added later mean what was done before.

    Raises:
        UsageError: naming the first field that is unknown, missing or of another type.
    """
    if not isinstance(data, dict):
        raise UsageError(f"{path or 'the configuration'} must be an object")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    missing = sorted(set(hints) - set(data)) if complete else []
    if unknown or missing:
        what, name = ("unknown", unknown[0]) if unknown else ("missing", missing[0])
        name = name if name.isprintable() else ascii(name)  # a line break, say
        raise UsageError(f"configuration field {path}{name} is {what}")
    return cls(
        **{name: _parse(value, hints[name], path + name, complete) for name, value in data.items()}
    )


def _parse(value: Any, hint: Any, path: str, complete: bool) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(value, hint, path + ".", complete=complete)
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
    elif hint == tuple[int, ...]:
        if isinstance(value, (list, tuple)) and all(type(item) is int for item in value):
            return tuple(value)
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif type(value) is hint:
        return value
    raise UsageError(f"configuration field {path} cannot be {value!r}")
