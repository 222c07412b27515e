"""Film what an agent of CarRacing plans: its candidate paths over the camera (paper's Figure 1).

python experiments/plan_video.py AGENT --episode 0 --decisions 100 --candidates 12 --out drive.gif

AGENT is a run, a checkpoint, an exported or a bundled agent of CarRacing. It drives one of the
fixed episodes, without noise. Each frame shows a decision: where the chosen plan would take the car
(white), and where random candidates would, half of them around the plan and half around zero,
coloured by the return that the model predicts for them. Paths are simulated, not imagined: they
show what the sequences do, and their colours what the agent expects of it.

On the right: the latents imagined under the chosen plan, decoded, each beside what the agent saw
when that time came. It had planned anew by then, so what came need not follow the plan. This takes
a decoder of the agent's latents (see decoder.py); the bundled carracing comes with one.

Below: the predicted reward of each executed chunk against the received one, and the value of what
the agent saw. Ctrl-C keeps the frames so far.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import decoder as decoders
import evidence
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.envs.box2d.car_racing import FPS, SCALE, WINDOW_H, WINDOW_W, ZOOM
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.progress import Progress

from valdi_jax import Agent, cli, compilation, model
from valdi_jax.config import Config
from valdi_jax.data.rollout import Job
from valdi_jax.data.source import evaluation_jobs
from valdi_jax.envs.carracing_render import FastCarRacing
from valdi_jax.envs.workers import Stepper
from valdi_jax.errors import UsageError
from valdi_jax.observation import Observation
from valdi_jax.planners import correlated_normal, draw_tail, first_carry, plan, predicted_return
from valdi_jax.planners.scoring import end_value
from valdi_jax.run.video import video_writer
from valdi_jax.types import Array, Params

QUICK = {"decisions": 4, "candidates": 3}
SIDE = 384  # pixels of the square camera image, 4 times the state's
STRIP = 160  # pixels of the plots below it
PICTURE, TITLE = 92, 16  # pixels of each square picture on the right, and above it
COLUMN = 2 * PICTURE + 24  # pixels of two of them
ROWS = 5  # of them, at most
HISTORY = 50  # decisions in the plots
SPREAD = 0.3  # standard deviation around the plan, before tanh; around zero it is 1
COLORS = colormaps["plasma"]  # perceptual, and without the green of the grass

BODY = ("position", "angle", "linearVelocity", "angularVelocity")
WHEEL = ("gas", "brake", "steer", "phase", "omega")


class Camera(NamedTuple):
    """The view of a frame, which follows the car and turns with it."""

    x: float
    y: float
    angle: float
    zoom: float

    @classmethod
    def of(cls, env: FastCarRacing) -> Camera:
        """The camera of the last frame; it zooms in over the first second."""
        x, y = env.car.hull.position
        zoom = 0.1 * SCALE * max(1 - env.t, 0) + ZOOM * SCALE * min(env.t, 1)
        return cls(x, y, env.car.hull.angle, zoom)

    def project(self, points: np.ndarray) -> np.ndarray:
        """Points [..., 2] of the world in the frame [..., 2], from (0, 0) top left to (1, 1)."""
        ahead = points - np.array([self.x, self.y])
        cos, sin = math.cos(-self.angle), math.sin(-self.angle)
        x = cos * ahead[..., 0] - sin * ahead[..., 1]
        y = sin * ahead[..., 0] + cos * ahead[..., 1]
        # The car is a quarter of the window's height above its lower edge; y points up.
        right, down = WINDOW_W / 2 + x * self.zoom, WINDOW_H * 3 / 4 - y * self.zoom
        return np.stack([right / WINDOW_W, down / WINDOW_H], axis=-1)


class Shadow:
    """A second environment of an episode, in which candidates are tried from the real car's state.

    The physics engine's worlds do not copy. But all that moves is the car, whose state can be set;
    the impulses in its joints are left out, as these are only where the solver begins.
    """

    def __init__(self, env: gym.Env, job: Job):
        self._env: FastCarRacing = env.unwrapped
        self._env.skip_frames = True
        env.reset(seed=job.seed)

    def paths(self, real: FastCarRacing, sequences: np.ndarray, *, hold: int) -> np.ndarray:
        """Positions [N, 1 + T * hold, 2] of the car under actions [N, T, A], from where it is."""
        bodies = [real.car.hull, *real.car.wheels]
        start = [{name: _value(body, name) for name in BODY} for body in bodies]
        controls = [{name: _value(wheel, name) for name in WHEEL} for wheel in real.car.wheels]
        return np.stack([self._path(start, controls, each, hold) for each in sequences])

    def _path(
        self,
        start: list[dict[str, Any]],
        controls: list[dict[str, float]],
        actions: np.ndarray,
        hold: int,
    ) -> np.ndarray:
        car, world = self._env.car, self._env.world
        bodies = [car.hull, *car.wheels]
        # Friction lags a step behind: it is that of the tiles under the wheels before they moved.
        for body, state in zip(bodies, start, strict=True):
            body.position = np.subtract(state["position"], np.divide(state["linearVelocity"], FPS))
            body.angle = state["angle"] - state["angularVelocity"] / FPS
        world.Step(0.0, 1, 1)  # moves nothing, but finds these tiles
        states = [*zip(bodies, start, strict=True), *zip(car.wheels, controls, strict=True)]
        for body, state in states:
            for name, value in state.items():
                setattr(body, name, value)
        path = [tuple(car.hull.position)]
        for action in actions.repeat(hold, axis=0):
            self._env.step(action)
            path.append(tuple(car.hull.position))
        return np.array(path)


def _value(body: Any, name: str) -> Any:
    value = getattr(body, name)
    # A vector may change with its body.
    return tuple(value) if name in ("position", "linearVelocity") else value


class Decision(NamedTuple):
    """A decision, and what came of it."""

    image: np.ndarray  # [96, 96, 3] uint8, the frame that it was made from
    camera: Camera
    actions: np.ndarray  # [N, H * C, A], the chosen plan and then the candidates
    returns: np.ndarray  # [N] predicted
    paths: np.ndarray  # [N, 1 + steps, 2] in the world
    predicted: float  # discounted reward of the executed chunk
    received: float
    value: float
    imagined: np.ndarray  # [H, D] latents under the chosen plan
    seen: np.ndarray  # [h, w, 3] uint8, what was encoded


# Images [N, h, w, 3] in [0, 1] of latents [N, D].
Decode = Callable[[np.ndarray], Array]


@functools.partial(jax.jit, static_argnames=("config", "candidates"))
def decide(
    params: Params,
    observation: Observation,
    keys: tuple[Array, Array],
    decision: Array,
    carry: Any,
    *,
    config: Config,
    candidates: int,
) -> tuple[Array, Any, Array, Array, Array, Array]:
    """Plan from one observation, and score the plan and candidates with the same noise.

    Returns: actions [1 + candidates, H * C, A], the planner's carry, predicted returns
    [1 + candidates], the first chunk's predicted reward, and the value, all in rewards; and the
    latents [H, D] that the plan's score is of.
    """
    search_key, other_key = (jax.random.fold_in(key, decision) for key in keys)
    chosen = plan(params, observation, search_key, config=config, carry=carry)
    draw_key, noise_key, tail_key, end_key = jax.random.split(other_key, 4)
    sizes, planner, count = config.model, config.planner, 1 + candidates
    draw = functools.partial(
        correlated_normal, shape=config.plan_shape, correlation=planner.correlation
    )
    noise = jax.vmap(draw)(jax.random.split(draw_key, candidates))
    center = jnp.arctanh(jnp.clip(chosen.actions, -0.999, 0.999))
    near = (jnp.arange(candidates) % 2 == 0)[:, None, None]
    others = jnp.tanh(jnp.where(near, center[None] + SPREAD * noise, noise))
    actions = jnp.concatenate([chosen.actions[None], others])

    z = model.encode(params, observation, config=config)
    chunks = actions.reshape(count, sizes.horizon, -1)
    start = jax.random.normal(noise_key, (sizes.horizon, sizes.latent_dim))
    steps = planner.diffusion_steps
    returns = predicted_return(
        params,
        z,
        chunks,
        jnp.broadcast_to(start, (count, *start.shape)),
        config=config,
        steps=steps,
        tail=draw_tail(tail_key, (count,), config=config),
    )
    imagined = model.imagine(params["dynamics"], z, chunks[0], start, config=sizes, steps=steps)
    reward = model.reward(params, z, chunks[0, 0], config=config)
    value = end_value(params, z, draw_tail(end_key, (), config=config), config=config)
    scale = config.learn.reward_scale
    return actions, chosen.carry, returns / scale, reward / scale, value / scale, imagined


def drive(agent: Agent, job: Job, *, decisions: int, candidates: int) -> Iterator[Decision]:
    """The decisions of an episode, at most so many."""
    config = agent.config.graph
    env = agent.make_env()
    real: FastCarRacing = env.unwrapped
    shadow_env = agent.make_env()
    shadow = Shadow(shadow_env, job)
    stepper = Stepper(lambda: env, last_only=True)
    try:
        keys = job.key, jax.random.fold_in(jax.random.key(1), job.seed)
        observation, carry = stepper.reset(job.seed), jax.device_get(first_carry(config))
        for decision in range(decisions):
            actions, carry, returns, predicted, value, imagined = jax.device_get(
                decide(
                    agent.params,
                    observation,
                    keys,
                    np.int32(decision),
                    carry,
                    config=config,
                    candidates=candidates,
                )
            )
            image, camera = real.frame(), Camera.of(real)
            paths = shadow.paths(real, actions, hold=agent.config.env.action_repeat)
            steps = stepper.step(actions[0, : config.model.chunk])
            received = np.dot(steps.rewards, config.learn.discount ** np.arange(len(steps.rewards)))
            yield Decision(
                image,
                camera,
                actions,
                returns,
                paths,
                float(predicted),
                float(received),
                float(value),
                imagined,
                observation.image,
            )
            if steps.terminated or steps.truncated:
                break
            observation = steps.observations[-1]
    finally:
        stepper.close()
        shadow_env.close()


def panel(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """New axes at a place in pixels."""
    across, up = 100 * figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def draw_pictures(
    figure: Figure, history: Sequence[Decision], number: int, *, chunk: int, decode: Decode
) -> None:
    """What a decision expects, decoded, beside what came, unless that is not known."""
    imagined, came = history[number].imagined, [one.seen for one in history[number:]]
    ahead = np.linspace(1, len(imagined), min(ROWS, len(imagined))).round().astype(int)
    for row, (h, picture) in enumerate(zip(ahead, decode(imagined[ahead - 1]), strict=True)):
        images = {f"imagined, in {h * chunk} frames": picture, "what came": None}
        if h < len(came):
            images["what came"] = came[h]
        for column, (name, image) in enumerate(images.items()):
            left = SIDE + 8 + column * (PICTURE + 8)
            bottom = SIDE + STRIP - (row + 1) * (PICTURE + TITLE)
            axes = panel(figure, left, bottom, PICTURE, PICTURE)
            axes.set_title(name, loc="right" if column else "left", fontsize=7, pad=2)
            axes.set(xticks=[], yticks=[], facecolor="0.93")
            if image is not None:
                axes.imshow(image, interpolation="bicubic", aspect="auto")


def draw(
    history: Sequence[Decision], number: int, *, chunk: int, decode: Decode | None
) -> np.ndarray:
    """The frame [SIDE + STRIP, SIDE, 3] uint8 of a decision, with `COLUMN` if there is ``decode``.

    ``history`` holds the decisions before it, and those after it that are known; ``chunk`` is in
    frames.
    """
    decision = history[number]
    width, height = SIDE + (COLUMN if decode else 0), SIDE + STRIP
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)

    camera = panel(figure, 0, STRIP, SIDE, SIDE)
    camera.imshow(decision.image, extent=(0, 1, 1, 0), interpolation="bicubic", aspect="auto")
    camera.axis("off")
    low, high = decision.returns.min(), decision.returns.max()
    shades = (decision.returns - low) / max(high - low, 1e-6)
    lines = decision.camera.project(decision.paths)
    for index in np.argsort(decision.returns):  # the best on top
        if index:
            camera.plot(*lines[index].T, color=COLORS(shades[index]), linewidth=1.8)
    camera.plot(*lines[0].T, color="white", linewidth=4, solid_capstyle="round")
    camera.set(xlim=(0, 1), ylim=(1, 0))

    key = camera.inset_axes((0.64, 0.93, 0.28, 0.03))
    key.imshow(np.linspace(0, 1, 64)[None], cmap=COLORS, extent=(0, 1, 0, 1), aspect="auto")
    key.set_yticks([])
    key.set_xticks([0, 1], [f"{low:.1f}", f"{high:.1f}"])
    key.tick_params(colors="white", labelsize=8, length=0)
    key.set_title("predicted return", color="white", fontsize=8, pad=2)

    recent = history[max(number + 1 - HISTORY, 0) : number + 1]
    last = max(number, HISTORY - 1)
    at = np.arange(number - len(recent) + 1, number + 1)
    rewards = panel(figure, 42, 86, 330, 66)
    rewards.plot(at, [one.received for one in recent], color="0.55", label="received reward")
    rewards.plot(at, [one.predicted for one in recent], color="C3", label="predicted")
    value = panel(figure, 42, 20, 330, 56)
    value.plot(at, [one.value for one in recent], color="C0", label="value")
    for axes in (rewards, value):
        axes.set_xlim(last - HISTORY + 1, last)
        axes.tick_params(labelsize=7, length=2, pad=2)
        axes.legend(loc="upper left", fontsize=7, frameon=False, ncols=2, borderaxespad=0.1)
        axes.margins(y=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for line in axes.lines:
            line.set(linewidth=1.3, marker="o", markersize=1.8)
    rewards.tick_params(labelbottom=False)

    if decode:
        draw_pictures(figure, history, number, chunk=chunk, decode=decode)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def load(name: str) -> Agent:
    """Load an agent of CarRacing.

    Raises:
        UsageError: if it is none, or predicts no return.
    """
    agent = evidence.load(name, "dynamics", "reward")
    env = agent.make_env()
    try:
        if not isinstance(env.unwrapped, FastCarRacing):
            raise UsageError(
                f"{name} is an agent of {agent.config.env.name}: plans are drawn for carracing only"
            )
    finally:
        env.close()
    return agent


def film(
    agent: Agent,
    job: Job,
    *,
    decisions: int,
    candidates: int,
    decode: Decode | None = None,
    on_decision: Callable[[], None] = lambda: None,
) -> tuple[list[np.ndarray], list[Decision]]:
    """Frames and decisions; `cli.Interrupted`, raised by ``on_decision``, ends them there."""
    frames: list[np.ndarray] = []
    history: list[Decision] = []
    sizes, hold = agent.config.model, agent.config.env.action_repeat

    def draw_next() -> None:
        frames.append(draw(history, len(frames), chunk=sizes.chunk * hold, decode=decode))

    driving = drive(agent, job, decisions=decisions, candidates=candidates)
    with contextlib.suppress(cli.Interrupted), contextlib.closing(driving):
        for decision in driving:
            history.append(decision)
            if len(history) > sizes.horizon:  # all that it shows has come
                draw_next()
            on_decision()
    while len(frames) < len(history):
        draw_next()
    return frames, history


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("agent", metavar="AGENT")
    parser.add_argument("--episode", type=int, default=0, help="which of the 100 fixed ones")
    parser.add_argument("--decisions", type=int, default=100, help="at most, one frame each")
    parser.add_argument("--candidates", type=int, default=12, help="beside the chosen plan")
    parser.add_argument(
        "--decoder", type=Path, metavar="DIR", help="of the agent's latents; a bundled one's own"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".gif or .mp4")
    parser.add_argument("--quick", action="store_true", help="a trial: 4 decisions, 3 candidates")
    arguments = evidence.parse(parser, argv, QUICK)
    if not 0 <= arguments.episode < 100:
        raise UsageError(f"--episode is {arguments.episode}; the fixed ones are 0 to 99")
    for name in ("decisions", "candidates"):
        value = getattr(arguments, name)
        if value < 1:
            raise UsageError(f"--{name} is {value}; it must be above 0")
    return arguments


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    if arguments.out.suffix not in (".gif", ".mp4"):  # the writer would name another option
        raise UsageError(f"--out writes .gif or .mp4, not {arguments.out.name!r}")
    write = video_writer(arguments.out)
    compilation.cache_compilations()
    agent, decode = load(arguments.agent), None
    if directory := arguments.decoder or decoders.shipped(arguments.agent):
        decoder, params = decoders.load_for(agent, arguments.agent, directory)
        decode = functools.partial(decoders.decode_all, params, decoder=decoder)
    job = evaluation_jobs(arguments.episode + 1)[-1]
    with cli.interruptible() as interrupt, Progress(transient=True) as bar:
        task = bar.add_task("driving", total=arguments.decisions)

        def on_decision() -> None:
            bar.advance(task)
            interrupt()

        frames, history = film(
            agent,
            job,
            decisions=arguments.decisions,
            candidates=arguments.candidates,
            decode=decode,
            on_decision=on_decision,
        )
        if arguments.out.suffix == ".gif":  # the writer halves them: what was drawn is kept
            frames = [frame.repeat(2, axis=0).repeat(2, axis=1) for frame in frames]
        config = agent.config
        write(frames, FPS / (config.model.chunk * config.env.action_repeat))
    errors = [abs(one.predicted - one.received) for one in history]
    print(
        f"{arguments.out}: {len(frames)} decisions of episode {arguments.episode}, rewards "
        f"predicted with a mean error of {np.mean(errors):.2f}"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
