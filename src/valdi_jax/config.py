"""Typed, hashable configuration.

Every field is a command-line option (``--planner.candidates 128``). Fields are checked on
construction; `validate` checks them against one another.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import reprlib
import typing
from collections.abc import Callable, Collection, Iterator
from dataclasses import field
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import tyro
from pydantic import Field
from pydantic.dataclasses import dataclass

from valdi_jax.errors import UsageError

T = TypeVar("T")

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]


@typing.dataclass_transform(frozen_default=True, field_specifiers=(field, Field))
def _section(path: str) -> Callable[[type[T]], type[T]]:
    """Make a frozen dataclass with checked fields; its options begin with ``--{path}.``.

    Raises:
        UsageError: on construction, naming the first field that is out of range.
    """

    def decorate(cls: type[T]) -> type[T]:
        settings = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
        made: Any = dataclass(frozen=True, config=settings)(cls)
        check = made.__init__

        @functools.wraps(check)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            try:
                check(self, *args, **kwargs)
            except pydantic.ValidationError as error:
                first = error.errors()[0]
                if first["type"] == "unexpected_keyword_argument":
                    raise TypeError(f"{cls.__name__} has no field {first['loc'][0]}") from None
                names = [part for part in first["loc"] if isinstance(part, str)]
                option = ".".join((path, *names)).lstrip(".").replace("_", "-")
                raise UsageError(f"--{option} {_complaint(first)}") from None

        made.__init__ = init
        return made

    return decorate


def _complaint(error: Any) -> str:
    """Describe an invalid value: "is 0; it should be greater than or equal to 1"."""
    wish = error["msg"].removeprefix("Input ").removeprefix("Tuple ")
    return f"is {reprlib.repr(error['input'])}; it {wish[:200]}"


@_section("env")
class EnvConfig:
    """The environment."""

    name: Annotated[str, tyro.conf.arg(name="env", prefix_name=False, metavar="NAME")] = "carracing"
    """Environment to train on: carracing, pendulum, mountaincar, lunarlander, bipedalwalker,
    bipedalwalker-hardcore, dmc:DOMAIN-TASK of the DeepMind Control Suite (extra dmc), maze:umaze,
    medium or large (extra maze), or gym:ID for any environment registered with Gymnasium."""
    max_steps: Natural = 600
    """Environment steps after which an episode is truncated; 0 for the environment's own limit."""
    action_repeat: Count = 1
    """Environment steps for which an action is held; to the agent one step, with their summed
    reward. All other options and figures count holds, except --env.max-steps."""
    patience: Natural = 0
    """Truncate a training episode after this many environment steps without a positive reward
    (CarRacing: without a new tile); 0 for never. Evaluation ignores it."""
    render_every: Literal["step", "chunk"] = "step"
    """Keep the observation after every step, or only after each chunk, where the planner sees it:
    faster to render and a third to store, but training segments then start at decisions only."""
    downsample: Count = 1
    """CarRacing: average each frame over pixel blocks of this side; 2 makes frames 48 x 48."""
    pixels: Natural = 0
    """DeepMind Control: side of the images to observe instead of the states, such as 64; 0 for the
    states."""
    frames: Count = 3
    """DeepMind Control from pixels: images in an observation, of successive decisions."""


@_section("model.unet")
class UNetConfig:
    """Diffuser's networks over plans of states and actions (Janner et al., 2022)."""

    width: Count = 32
    """Channels of the first level; a multiple of 8."""
    multipliers: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 4, 8)
    """Channels of each level, in widths. A plan has --model.horizon + 1 steps, which must be a
    multiple of 2^(levels - 1)."""
    attention: bool = False
    """Linear attention over time in the U-Net."""
    timesteps: Annotated[int, Field(ge=2)] = 20
    """Diffusion timesteps of the cosine schedule."""
    scaler: Literal["gaussian", "limits", "safe-limits", "cdf"] = "gaussian"
    """How states and actions are normalised, once, on recorded data."""
    goal: Natural = 0
    """Last numbers of an observation that are the goal: no part of the state, they are pinned in a
    plan's last state, whose other numbers are 0."""


@_section("model.prior")
class PriorConfig:
    """The network prior: plans of action chunks and latents, on Valdi's transformer."""

    timesteps: Annotated[int, Field(ge=2)] = 20
    """Diffusion timesteps of its cosine schedule."""
    goal: Natural = 0
    """Last numbers of an observation that are the goal: the latent of the observation in which they
    are also the first, and all between 0, is pinned at a plan's end."""


@_section("model")
class ModelConfig:
    """The networks (paper, Supp. B)."""

    dynamics: str = "diffusion"
    """World model: diffusion (the paper's transformer), flow (the same, as a rectified flow), mlp
    (the deterministic one-step baseline) or simplex (TD-MPC2's, with --model.encoder simplex)."""
    encoder: Literal["paper", "simplex"] = "paper"
    """Encoder: the paper's, or simplex (TD-MPC2's, whose latents lie on simplices)."""
    networks: tuple[str, ...] = ()
    """Additional networks, besides encoder, dynamics, reward and value: policy (a Gaussian prior of
    action chunks), energy (MBDPO's), q (critics of latent and chunk, in place of the value) and
    prior (a diffusion prior of plans, for the guided planner). unet and plan_value are Diffuser's
    and stand alone."""
    latent_dim: Count = 64
    """Size D of the latent."""
    horizon: Count = 5
    """World-model steps H to imagine."""
    chunk: Count = 3
    """Environment steps C per world-model step."""
    action_dim: tyro.conf.Suppress[Count] = 3
    """Action size A; training takes it from the environment."""
    state_dim: tyro.conf.Suppress[Natural] = 0
    """State size X of Diffuser's plans; training takes it from the environment."""
    normalize: bool = False
    """Normalise vector observations by their running mean and variance."""
    encoder_width: Count = 256
    """Width of each modality's embedding."""
    cnn_channels: Annotated[tuple[Count, ...], Field(min_length=5, max_length=5)] = (
        16,
        32,
        64,
        128,
        256,
    )
    """Channels of the convolutions: the first, three that halve the image (the third repeats for
    larger images), and the last."""
    diffusion_timesteps: Count = 1000
    """Diffusion timesteps T of the noise schedule."""
    one_step_share: Fraction = 0.0
    """Share of each batch with timestep T - 1, from which plans sample in one step; the rest learns
    timesteps drawn uniformly, as all do in the paper (diffusion alone)."""
    timestep_dim: Count = 32
    """Size of the learned timestep embedding."""
    transformer_width: Count = 256
    """Width of the diffusion transformer."""
    transformer_depth: Count = 6
    """Blocks of the diffusion transformer."""
    transformer_heads: Count = 8
    """Attention heads."""
    transformer_hidden: Count = 512
    """Hidden width of a transformer block's feed-forward network."""
    mlp_width: Count = 384
    """Width of the MLP dynamics."""
    mlp_depth: Count = 6
    """Residual blocks of the MLP dynamics."""
    reward_width: Count = 256
    """Width of the reward head."""
    reward_depth: Count = 2
    """Residual blocks of the reward head."""
    value_width: Count = 512
    """Hidden width of a value head."""
    value_heads: Count = 2
    """Value heads E; the value is their minimum. With the network q, its critics."""
    encoder_depth: Count = 2
    """Layers of the simplex encoder."""
    policy_width: Count = 256
    """Hidden width of the policy prior and the energy."""
    bins: Natural = 0
    """Bins of a distribution over rewards and values in symlog space, as in TD-MPC2; 0 for scalars
    with squared errors."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout in the first layer of the critics q, while they learn."""
    rho: Fraction = 1.0
    """Weight rho^t of a rollout's step t in the losses of heads and simplex dynamics."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)


@_section("planner.icem")
class ICEMConfig:
    """iCEM (Pinneri et al., 2020), in action space."""

    noise_exponent: Weight = 2.0
    """Exponent of the power-law spectrum of a candidate's noise over time; 0 is white noise."""
    decay: Annotated[float, Field(ge=1)] = 1.25
    """Factor by which the number of candidates decays in each iteration."""
    kept: Fraction = 0.3
    """Share of the elites kept for the next iteration and the next decision."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Weight of the previous mean and standard deviation in each refit."""
    std: Positive = 0.5
    """Initial standard deviation of a search."""


@_section("planner.mppi")
class MPPIConfig:
    """MPPI as in TD-MPC2 (Hansen et al., 2024), in action space."""

    temperature: Positive = 0.5
    """Factor on the returns in the softmax that weights the elites."""
    min_std: Positive = 0.05
    """Minimum standard deviation of the sampling distribution."""
    max_std: Positive = 2.0
    """Maximum standard deviation of the sampling distribution, and its initial value."""


@_section("planner.mbdpo")
class MBDPOConfig:
    """MBDPO's search (2605.26282), a reverse diffusion over the action sequence."""

    steps: Annotated[int, Field(ge=2)] = 20
    """Noise levels M; M - 1 iterations."""
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """Variance of the lowest noise level; the levels between are linear."""
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 1e-2
    """Variance of the highest noise level."""
    temperature: Positive = 0.5
    """Divisor of the standardised returns in the softmax that weights the elites."""


@_section("planner.diffuser")
class DiffuserConfig:
    """Guided sampling of plans: Diffuser's, and the guided planner's on latents."""

    scale: Weight = 0.1
    """Factor on the gradient of the plan's value, besides the posterior variance."""
    guide_steps: Natural = 2
    """Steps along this gradient at each timestep; diffuser needs a network plan_value for them."""
    guide_stop: Natural = 2
    """Timesteps at the end of the sampling that have no guidance."""
    through: bool = False
    """guided: take the gradient through the prior, at twice the cost, instead of at its estimate of
    the clean plan."""
    warm_start: Natural = 0
    """Timesteps that are sampled anew from the previous plan, shifted and noised; 0 starts each
    plan from noise."""
    clip: bool = False
    """diffuser: clip the clean estimates to [-1, 1]."""
    controller: Literal["actions", "waypoints"] = "actions"
    """diffuser: take the plan's actions, planning anew each step; or plan once an episode and
    follow its states, of which the first half are positions and the rest their velocities."""
    replan_distance: Weight = 0.0
    """waypoints: plan anew where a position is farther than this from the planned one, in its own
    units; 0 never does, as the authors."""


@_section("planner")
class PlannerConfig:
    """The search for actions (paper, Supp. D)."""

    kind: str = "cem"
    """cem (the paper's cross-entropy method), icem, mppi, mbdpo, guided, which samples plans of the
    network prior, or diffuser, which samples them with its own networks."""
    candidates: Count = 512
    """Action sequences N sampled per iteration (iCEM: in the first)."""
    elites: Annotated[int, Field(ge=2)] = 64
    """Best sequences K, which give the next mean and standard deviation."""
    iterations: Count = 10
    """Iterations I (MBDPO: --planner.mbdpo.steps)."""
    diffusion_steps: Count = 1
    """DDIM steps per imagined trajectory."""
    answer: Literal["best", "mean", "sample"] = "best"
    """Return the best sequence of all iterations (guided: always), the final elite mean (MBDPO:
    always), or, with MPPI, an elite of the last iteration drawn by its weight, as in TD-MPC2."""
    policy_candidates: Natural = 0
    """MPPI and MBDPO: candidates that the policy prior rolls out, if there is one."""
    eta: Weight = 0.01
    """Weight of the energy in the reward of a candidate's step, if there is one (MBDPO)."""
    action_hold: Count = 1
    """Environment steps for which candidates and exploration noise hold an action; must divide
    --model.chunk."""
    correlation: Fraction = 0.0
    """Correlation between the noise of successive held actions in a plan, for exploration and for
    CEM's candidates."""
    warm_start: bool = False
    """CEM: start the search at the previous plan's mean, shifted by the executed chunk, instead of
    at zero. The other searches always do; guided and diffuser: --planner.diffuser.warm-start."""
    shared_noise: bool = False
    """Start all candidates of a plan from one noise draw instead of one each."""
    futures: Count = 1
    """Futures that a search imagines of each candidate; their mean return is its score. They start
    from noise draws and their negatives in turn."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision in which candidates are imagined and scored; the encoder stays in float32."""
    icem: ICEMConfig = field(default_factory=ICEMConfig)
    mppi: MPPIConfig = field(default_factory=MPPIConfig)
    mbdpo: MBDPOConfig = field(default_factory=MBDPOConfig)
    diffuser: DiffuserConfig = field(default_factory=DiffuserConfig)


@_section("learn.policy")
class PolicyConfig:
    """The policy prior's own step, after that of all others (TD-MPC2)."""

    entropy: Weight = 1e-4
    """Weight of the entropy."""
    scale_rate: Share = 0.01
    """Rate of the running range of q that divides it."""


@_section("learn.energy")
class EnergyConfig:
    """The energy: a classifier of replayed actions against others (MBDPO)."""

    noise: Weight = 0.5
    """Standard deviation of the noise on a negative."""
    rate: Share = 0.01
    """Rate of the running mean and standard deviation of its logits."""
    clip: Positive = 5.0
    """Limit of the normalised logit in a candidate's return."""
    aligned: bool = True
    """Pair each state with its own action; off, as the authors' code pairs them."""


@_section("learn.plan")
class PlanConfig:
    """Diffuser's losses."""

    action_weight: Weight = 10.0
    """Weight of a plan's first action."""
    discount: Share = 1.0
    """Factor per step on the weight of a plan's later entries."""
    penalty: Weight = 100.0
    """Subtracted from the last reward of an episode that terminates, for the plan's value."""
    padding: bool = True
    """Windows may reach beyond an episode's end, where states and actions are 0."""


@_section("learn")
class LearnConfig:
    """The objective and the optimizer (paper, Supp. C and Table 3)."""

    terms: tuple[str, ...] = ("dynamics", "reward", "value", "sigreg")
    """Terms of the objective."""
    batch_size: Count = 256
    """Segments B in a batch."""
    updates_per_step: Weight = 0.1
    """Updates per environment step collected; 0.1 is 60 for a full CarRacing episode."""
    learning_rate: Share = 3e-4
    """Adam's learning rate."""
    adam_b1: Decay = 0.9
    """Adam's first-moment decay."""
    adam_b2: Decay = 0.999
    """Adam's second-moment decay."""
    max_grad_norm: Positive = 10.0
    """Global gradient norm at which to clip."""
    ema_rate: Share = 0.005
    """Weight of the online parameters in the moving average at each update."""
    ema_every: Count = 1
    """Updates between those that move the average."""
    ema_start: Natural = 0
    """Updates before which the moving average is a plain copy."""
    act: Literal["params", "ema"] = "params"
    """Act with the online parameters, or with their moving average, as Diffuser does."""
    average: Fraction = 0.0
    """Act with an average of the parameters over about this share of all updates so far (power
    EMA, Karras et al., 2024); 0 for the latest parameters, as in the reference."""
    discount: Share = 0.99
    """Discount per environment step."""
    encoder_rate: Weight = 1.0
    """Factor on the encoder's learning rate (TD-MPC2: 0.3)."""
    target_encoder: Literal["ema", "online"] = "ema"
    """Encoder of the latents that the dynamics predict (TD-MPC2: online)."""
    last_step: bool = True
    """Train the heads also at the last latent of a segment (TD-MPC2 does not)."""
    energy_weight: Weight = 1.0
    """Weight of the energy's loss."""
    diffusion_weight: Weight = 1.0
    """Weight of the dynamics loss."""
    reward_weight: Weight = 0.01
    """Weight of the reward loss."""
    value_weight: Weight = 0.01
    """Weight of the temporal-difference loss."""
    sigreg_weight: Fraction = 0.05
    """Weight of SIGReg; one minus it scales all other terms."""
    sigreg_directions: Count = 1024
    """Random directions that SIGReg projects onto."""
    sigreg_knots: Annotated[int, Field(ge=2)] = 17
    """Points at which the characteristic functions are compared."""
    bootstrap_terminal: bool = True
    """Bootstrap the TD target through a terminal step, as the reference does."""
    reward_scale: Positive = 1.0
    """Factor on the rewards that the heads learn; reported returns are not scaled."""
    updates_per_dispatch: Count = 8
    """Maximum updates per call, where the replay buffer is on the device."""
    devices: Natural = 0
    """Devices that share an update; 0 for all accelerators that split the batch evenly, or one on a
    CPU, which a single update already fills."""
    processes: Natural = 1
    """Processes that share an update, all started with the same options; 0 for as many as Slurm, or
    another cluster that JAX knows, has started."""
    coordinator: Annotated[str, tyro.conf.arg(metavar="HOST:PORT")] = ""
    """Where the first of several processes listens; by default what JAX finds out."""
    rank: Annotated[int, Field(ge=-1)] = -1
    """Number of this process among several, from 0; -1 for what JAX finds out."""
    heartbeat: Count = 100
    """Seconds without a sign of life, after which one of several processes is lost and all end."""
    watchdog: Natural = 1800
    """Seconds without an update or a new episode, after which each of several processes ends; more
    than a round with its evaluation takes. 0 for any time."""
    nonfinite_limit: Count = 10
    """Stop training after this many consecutive updates with a non-finite loss or gradient, or this
    many consecutive episodes without a finite planner score."""
    td_encoder: Literal["online", "ema"] = "online"
    """Encoder of the TD target's latents (the reference: online)."""
    td_lambda: Fraction = 0.0
    """Weight of longer returns in the TD target, up to the end of the segment: TD(lambda), without
    off-policy correction. 0 is the reference's one-step target."""
    mirror: bool = False
    """CarRacing: mirror half of the training segments left to right."""
    random_shift: Natural = 0
    """Shift the frames of each training segment by up to this many pixels each way, the same for
    all its frames."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)


@_section("collect")
class CollectConfig:
    """How experience is collected."""

    source: str = "environment"
    """Where episodes come from: environment (rollouts of the agent), or data (--data alone; an
    epoch then counts as an episode in all options and reports)."""
    data: Annotated[str, tyro.conf.arg(prefix_name=False, metavar="minari:ID")] = ""
    """Recorded episodes to learn from, beside those of the agent or alone: minari:ID is a local
    Minari dataset (extra offline)."""
    epoch: Count = 1000
    """Updates of an epoch, with --collect.source data."""
    episodes: Count = 5000
    """Training episodes, including the seed episodes."""
    seed_episodes: Natural = 10
    """Episodes collected by the untrained planner before the first update."""
    num_envs: Count = 1
    """Environments stepped in parallel; if several, each in a worker process."""
    episodes_per_round: Natural = 0
    """Episodes collected with the same parameters; 0 for one per environment."""
    lag: Natural = 0
    """Rounds that may be under way while earlier ones are learnt from: a round plans with the
    parameters after the updates owed by the rounds before the last ``lag``. 0 collects and learns
    in turn. The ratio of updates to environment steps stays the same."""
    cluster: str = ""
    """Collect with Ray (extra ray): its address, or local for a cluster of this machine alone."""
    actors: Count = 1
    """Ray actors, each with its own environments and a planner on the CPU; any number gives the
    same run."""
    worker_timeout: Positive = 60.0
    """Seconds after which an unresponsive worker process is replaced."""
    seed_noise: Weight = 0.0
    """Standard deviation of the exploration noise in the seed episodes; 0 for that of the first
    episode after them."""
    noise_start: Weight = 0.25
    """Initial standard deviation of the exploration noise; CEM adds it before tanh, the others to
    the action, which they clip."""
    noise_end: Weight = 0.05
    """Standard deviation of the exploration noise after the decay."""
    noise_hold: Natural = 250
    """Episodes at the initial noise level, counted after the seed episodes."""
    noise_decay: Natural = 250
    """Episodes over which the noise then decays linearly."""


@_section("replay")
class ReplayConfig:
    """The replay buffer."""

    capacity: Count = 1000
    """Episodes kept; the oldest is dropped first. Recorded data are kept besides."""
    data_share: Fraction = 0.5
    """Share of recorded data in a batch, once there are episodes of the agent's own."""
    sampling: Literal["episode", "step"] = "episode"
    """Draw training segments uniformly over episodes, as the reference does, or uniformly over the
    steps of all episodes, which favours long ones."""
    placement: Literal["auto", "device", "host"] = "auto"
    """Where training segments are gathered: device (from a copy of the episodes there, several
    updates per call) or host. auto: device on an accelerator, if the episodes fit and their length
    is known: from --env.max-steps, or from the data with --collect.source data."""


@_section("eval")
class EvalConfig:
    """Periodic evaluation, always on the same episodes."""

    every: Natural = 250
    """Training episodes between evaluations; 0 for none."""
    episodes: Annotated[int, Field(ge=1, le=100)] = 5
    """Episodes per evaluation: the first of 100 fixed reset seeds (CarRacing: tracks)."""
    video: bool = False
    """Also record the first of them, to RUN/videos and TensorBoard; it is driven once more."""


@_section("checkpoint")
class CheckpointConfig:
    """Checkpoints."""

    every: Count = 25
    """Episodes between checkpoints; one is always written at the end and on Ctrl-C."""
    keep: Count = 2
    """Checkpoints kept; older ones are deleted."""


@_section("")
class Config:
    """All settings of a run."""

    env: EnvConfig = field(default_factory=EnvConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    learn: LearnConfig = field(default_factory=LearnConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of all randomness in the run, of the 32 bits that a JAX key takes."""

    def replace(self, **sections: dict[str, Any]) -> Config:
        """A copy with some fields changed: ``config.replace(model={"chunk": 2})``.

        Raises:
            TypeError: if there is no such field.
        """
        unknown = sections.keys() - {each.name for each in dataclasses.fields(self)}
        if unknown:
            raise TypeError(f"Config has no field {unknown.pop()}")
        return dataclasses.replace(
            self,
            **{
                name: dataclasses.replace(getattr(self, name), **fields)
                for name, fields in sections.items()
            },
        )

    @functools.cached_property
    def graph(self) -> Config:
        """A copy in which all fields that do not affect compiled programs have their defaults.

        Compiled functions take this one, so that e.g. another seed does not recompile.
        """
        host = (
            *("updates_per_step", "updates_per_dispatch", "devices", "nonfinite_limit"),
            *("processes", "coordinator", "rank", "heartbeat", "watchdog"),
        )
        defaults: dict[str, Any] = {
            f.name: f.default for f in dataclasses.fields(LearnConfig) if f.name in host
        }
        return Config(
            model=self.model,
            planner=self.planner,
            learn=dataclasses.replace(self.learn, **defaults),
        )

    @property
    def plan_shape(self) -> tuple[int, int]:
        """Shape ``[H * C, A]`` of a planned action sequence."""
        return self.model.horizon * self.model.chunk, self.model.action_dim

    @property
    def search_shape(self) -> tuple[int, int]:
        """Shape ``[H * C / hold, A]`` of the searched sequence: one action per hold."""
        steps, size = self.plan_shape
        return steps // self.planner.action_hold, size

    @property
    def diffuses_plans(self) -> bool:
        """Whether the agent is Diffuser's, whose networks take whole plans of states."""
        return "unet" in self.model.networks

    @property
    def acts_with_average(self) -> bool:
        """Whether the agent acts with other parameters than the latest."""
        return bool(self.learn.average) or self.learn.act == "ema"

    @property
    def unit(self) -> str:
        """What a run counts: episodes, or epochs on recorded data alone."""
        return "epoch" if self.collect.source == "data" else "episode"

    @property
    def frame_stride(self) -> int:
        """Environment steps between stored observations."""
        return self.model.chunk if self.env.render_every == "chunk" else 1

    @property
    def episode_steps(self) -> int:
        """Maximum steps of an episode; 0 if only the environment knows."""
        return -(-self.env.max_steps // self.env.action_repeat)

    @property
    def ring_slots(self) -> int:
        """Slots of the agent's own episodes in the replay buffer; recorded ones follow."""
        own = 0 if self.collect.source == "data" else self.collect.episodes
        return min(self.replay.capacity, own)

    @property
    def segment_steps(self) -> int:
        """Environment steps that a training segment spans: (H + 1) * C."""
        return (self.model.horizon + 1) * self.model.chunk


def validate(config: Config) -> None:
    """Check the fields against one another.

    Raises:
        UsageError: naming the first that does not fit.
    """
    model, planner, env = config.model, config.planner, config.env

    def require(holds: bool, option: str, value: object, wish: str) -> None:
        if not holds:
            raise UsageError(f"{option} is {value}; it {wish}")

    if config.diffuses_plans and planner.kind != "diffuser":
        raise UsageError("--model.networks unet needs --planner.kind diffuser")
    if not config.diffuses_plans and (planner.kind == "diffuser" or "plan_value" in model.networks):
        raise UsageError("--planner.kind diffuser needs --model.networks unet")
    least = (config.segment_steps - 1) * env.action_repeat + 1
    require(
        not env.max_steps or env.max_steps >= least,
        *("--env.max-steps", env.max_steps),
        f"must be at least {least}, or no episode holds a training segment",
    )
    require(
        planner.elites <= planner.candidates or planner.kind in ("diffuser", "guided"),
        *("--planner.elites", planner.elites),
        f"must be at most --planner.candidates ({planner.candidates})",
    )
    require(
        planner.diffusion_steps <= model.diffusion_timesteps or model.dynamics != "diffusion",
        *("--planner.diffusion-steps", planner.diffusion_steps),
        f"must be at most --model.diffusion-timesteps ({model.diffusion_timesteps})",
    )
    require(
        planner.diffusion_steps == 1 or model.dynamics not in ("mlp", "simplex"),
        *("--planner.diffusion-steps", planner.diffusion_steps),
        f"does nothing with --model.dynamics {model.dynamics}",
    )
    require(
        planner.futures == 1 or model.dynamics not in ("mlp", "simplex"),
        *("--planner.futures", planner.futures),
        f"does nothing with --model.dynamics {model.dynamics}, which has one",
    )
    require(
        planner.action_hold == 1 or planner.kind != "guided",
        *("--planner.action-hold", planner.action_hold),
        "is for searches: guided samples every action",
    )
    require(
        model.chunk % planner.action_hold == 0,
        *("--planner.action-hold", planner.action_hold),
        f"must divide --model.chunk ({model.chunk})",
    )
    require(
        planner.mppi.min_std <= planner.mppi.max_std,
        *("--planner.mppi.min-std", planner.mppi.min_std),
        f"must be at most --planner.mppi.max-std ({planner.mppi.max_std})",
    )
    require(
        planner.futures == 1 or planner.kind not in ("diffuser", "guided"),
        *("--planner.futures", planner.futures),
        f"is for searches, which --planner.kind {planner.kind} is not",
    )
    collect = config.collect
    if collect.source == "data" and (collect.lag or collect.cluster):
        option = "--collect.lag" if collect.lag else "--collect.cluster"
        raise UsageError(f"{option} is for episodes that the agent collects, not for data alone")
    learn = config.learn
    for option, names in (
        ("--learn.terms", learn.terms),
        ("--model.networks", model.networks),
    ):
        if len(set(names)) < len(names):
            raise UsageError(f"{option} names one twice: {' '.join(names)}")
    for option, given in (("coordinator", learn.coordinator), ("rank", learn.rank >= 0)):
        require(
            not given or learn.processes != 1,
            *(f"--learn.{option}", getattr(learn, option)),
            "takes --learn.processes, how many there are",
        )
    require(
        learn.processes < 1 or learn.rank < learn.processes,
        *("--learn.rank", learn.rank),
        f"must be below --learn.processes ({learn.processes})",
    )
    require(
        collect.actors == 1 or bool(collect.cluster),
        *("--collect.actors", collect.actors),
        "takes --collect.cluster, an address or local",
    )
    require(
        planner.answer != "sample" or planner.kind not in ("cem", "icem", "diffuser"),
        *("--planner.answer", planner.answer),
        "is for --planner.kind mppi: give best or mean",
    )
    if env.name != "carracing" and (env.downsample > 1 or config.learn.mirror):
        option = "--learn.mirror" if config.learn.mirror else "--env.downsample"
        raise UsageError(f"{option} is for carracing alone, not for {env.name}")
    if env.pixels and not env.name.startswith("dmc:"):
        raise UsageError(f"--env.pixels is for dmc:DOMAIN-TASK alone, not for {env.name}")
    if env.frames != EnvConfig.frames and not env.pixels:
        raise UsageError(f"--env.frames is {env.frames}, but without --env.pixels none are seen")
    require(96 % env.downsample == 0, "--env.downsample", env.downsample, "must divide 96")
    if config.learn.act == "ema" and config.learn.average:
        raise UsageError("--learn.act ema and --learn.average exclude one another")
    if config.diffuses_plans:
        _validate_plans(config)
        return
    if "q" in model.networks and "value" in config.learn.terms:
        raise UsageError("--model.networks q takes the place of the value: drop the term value")
    if (model.encoder == "simplex") != (model.dynamics == "simplex"):
        raise UsageError("--model.encoder simplex and --model.dynamics simplex need each other")
    require(model.bins != 1, "--model.bins", model.bins, "must be 0 or at least 2")
    require(
        "q" not in model.networks or model.value_heads >= 2,
        *("--model.value-heads", model.value_heads),
        "must be at least 2 with critics, as their target is the lesser of two",
    )
    require(
        model.encoder != "simplex" or model.latent_dim % 8 == 0,
        *("--model.latent-dim", model.latent_dim),
        "must be a multiple of 8, the size of a simplex",
    )
    require(
        planner.policy_candidates < planner.candidates or planner.kind not in ("mppi", "mbdpo"),
        *("--planner.policy-candidates", planner.policy_candidates),
        f"must be below --planner.candidates ({planner.candidates})",
    )
    _validate_sampling(config)
    if model.dynamics in ("mlp", "simplex") and "prior" not in model.networks:
        return
    require(
        model.transformer_width % model.transformer_heads == 0,
        *("--model.transformer-width", model.transformer_width),
        f"must be a multiple of --model.transformer-heads ({model.transformer_heads})",
    )
    token = model.timestep_dim + model.chunk * model.action_dim + model.latent_dim + 1
    require(
        model.transformer_width >= token,
        *("--model.transformer-width", model.transformer_width),
        f"must be at least {token}, the sizes of a timestep, an action chunk and a latent, and one "
        "for the marker",
    )


def require_terms(config: Config, trained: Collection[str] = ()) -> None:
    """Check that each of ``model.networks`` learns, or was ``trained`` before.

    Raises:
        UsageError: naming the first that would stay as it was initialised.
    """
    terms = {"unet": "plan"}  # the others have their network's name
    for name in config.model.networks:
        term = terms.get(name, name)
        if name not in trained and term not in config.learn.terms:
            raise UsageError(f"--model.networks has {name}: give --learn.terms {term} too")


def _validate_sampling(config: Config) -> None:
    """As `validate`, for the planner that samples from the network prior."""
    model, planner = config.model, config.planner
    if model.prior.goal and "prior" not in model.networks:
        raise UsageError("--model.prior.goal needs --model.networks prior")
    if planner.kind != "guided":
        return
    if "prior" not in model.networks:
        raise UsageError("--planner.kind guided needs --model.networks prior")
    if planner.precision != "float32":
        raise UsageError("--planner.precision is for searches: guided samples in float32")
    _validate_warm_start(config, "--model.prior.timesteps", model.prior.timesteps, guided=True)


def _validate_warm_start(config: Config, option: str, timesteps: int, *, guided: bool) -> None:
    settings = config.planner.diffuser
    steps = settings.warm_start
    if steps > timesteps:
        raise UsageError(
            f"--planner.diffuser.warm-start is {steps}; it must be at most {option} ({timesteps})"
        )
    guided = guided and bool(settings.scale and settings.guide_steps)
    if guided and 0 < steps <= settings.guide_stop:
        raise UsageError(
            f"--planner.diffuser.warm-start is {steps}; the last {settings.guide_stop} timesteps "
            "have no guidance: give more of them, or a lower --planner.diffuser.guide-stop"
        )


def _validate_plans(config: Config) -> None:
    """As `validate`, for Diffuser."""
    unet, rows = config.model.unet, config.model.horizon + 1
    others = set(config.model.networks) - {"unet", "plan_value"}
    others |= set(config.learn.terms) - {"plan", "plan_value"}
    if others:
        raise UsageError(f"--model.networks unet stands alone, without {', '.join(sorted(others))}")
    unused = {
        "--learn.encoder-rate": config.learn.encoder_rate != 1,
        "--learn.random-shift": config.learn.random_shift != 0,
        "--model.normalize": config.model.normalize,
        "--planner.precision": config.planner.precision != "float32",
        "--planner.correlation": config.planner.correlation != 0,
        "--planner.diffusion-steps": config.planner.diffusion_steps != 1,
    }
    for option, given in unused.items():
        if given:
            raise UsageError(f"{option} does nothing for Diffuser, which has its own networks")
    if config.model.chunk != 1:
        raise UsageError(f"--model.chunk is {config.model.chunk}; Diffuser plans single steps: 1")
    guided = "plan_value" in config.model.networks
    _validate_warm_start(config, "--model.unet.timesteps", unet.timesteps, guided=guided)
    halvings = 2 ** (len(unet.multipliers) - 1)
    if rows % halvings:
        raise UsageError(
            f"--model.horizon is {rows - 1}; with {len(unet.multipliers)} levels, horizon + 1 must "
            f"be a multiple of {halvings}"
        )
    if config.planner.diffuser.controller == "waypoints":
        if not unet.goal:
            raise UsageError("--planner.diffuser.controller waypoints needs --model.unet.goal")
        if config.planner.diffuser.warm_start:
            raise UsageError(
                "--planner.diffuser.warm-start is for plans that are made anew: waypoints keep one"
            )
    elif config.planner.diffuser.replan_distance:
        raise UsageError(
            "--planner.diffuser.replan-distance needs --planner.diffuser.controller waypoints: "
            "actions are planned anew each step"
        )
    if unet.width % 8:
        raise UsageError(f"--model.unet.width is {unet.width}; it must be a multiple of 8")
    last = unet.width * unet.multipliers[-1]
    if "plan_value" in config.model.networks and last % 32:
        raise UsageError(
            f"the last level of --model.unet has {last} channels; plan_value needs a multiple of 32"
        )


def leaves(data: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Fields of a configuration as plain data, with their paths: ``("learn.discount", 0.99)``."""
    for name, value in data.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield path + name, value


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain JSON data."""
    return dataclasses.asdict(config)


def from_dict(data: Any) -> Config:
    """Read a configuration strictly from plain JSON data.

    Missing fields, unknown when the data was written, take their defaults, which reproduce the
    behaviour of that time (`added_since` names them).

    Raises:
        UsageError: naming the first field that is unknown, of another type or out of range.
    """
    if not isinstance(data, dict):
        raise UsageError("the configuration must be an object")
    try:
        return _READER.validate_json(json.dumps(_renamed(data)))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(part for part in map(str, first["loc"]) if not part.isdigit())
        name = name if name.isprintable() else ascii(name)  # e.g. a line break
        name = name[:80]
        if first["type"] == "unexpected_keyword_argument":
            raise UsageError(f"configuration field {name} is unknown") from None
        raise UsageError(f"configuration field {name} {_complaint(first)}") from None


_READER = pydantic.TypeAdapter(Config)


def _renamed(data: dict[str, Any]) -> dict[str, Any]:
    """The data with the present names of its fields."""
    collect = data.get("collect")
    if not isinstance(collect, dict) or not isinstance(collect.get("overlap"), bool):
        return data
    rest = {name: value for name, value in collect.items() if name != "overlap"}
    return data | {"collect": {"lag": int(collect["overlap"])} | rest}


def added_since(data: dict[str, Any]) -> list[str]:
    """Fields that are missing from plain JSON data and so take their defaults."""

    def absent(data: dict[str, Any], whole: dict[str, Any], path: str) -> Iterator[str]:
        for name, value in whole.items():
            if name not in data:
                yield path + name
            elif isinstance(value, dict):
                yield from absent(data[name], value, f"{path}{name}.")

    return list(absent(_renamed(data), to_dict(from_dict(data)), ""))
