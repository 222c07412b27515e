"""Futures that differ in their noise alone, as pictures (the paper's Figure 5).

python experiments/diverse_futures.py AGENT DECODER_DIR --steps 8 --out futures.png --json FILE

DECODER_DIR is what decoder.py wrote for this agent. At decisions spread over the first episode the
agent plans, and each plan is imagined many times. Four mean distances of all pairs of imagined
last states say how much these differ, in the JSON for each state and number of steps:

    pixels     root of the mean squared difference of the decoded images, in [0, 1]
    1 - SSIM   of the decoded images: structural similarity in windows of 7 x 7 pixels
    LPIPS      of the decoded images, as the paper's; null without its weights: see lpips.py
    latents    root of the mean squared difference of the latents, as in steps_sweep.py

States, plans and noise are the same for every number of steps.

The picture shows, for the last of --steps, the state whose decoded futures are furthest apart in
pixels, and four of them there: the two least alike, then twice the one furthest from those chosen.
Above them is what the episode saw. It had another plan at each decision, so it need not follow the
one imagined.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import decoder as decoders
import evidence
import jax
import jax.numpy as jnp
import lpips
import matplotlib.pyplot as plt
import numpy as np
import steps_sweep

from valdi_jax import Agent, cli
from valdi_jax.config import ModelConfig, validate
from valdi_jax.dynamics import DYNAMICS
from valdi_jax.errors import UsageError
from valdi_jax.networks.decoder import Decoder
from valdi_jax.run.manifest import check_writable
from valdi_jax.types import Array, Params

SHOWN = 4  # futures in the picture
WINDOW = 7  # pixels along a side
C1, C2 = 0.01**2, 0.03**2  # of SSIM, for values in [0, 1]
QUICK: dict[str, Any] = {"steps": [1], "rollouts": 20, "pairs": 2}
QUICK_STEPS = 60


def frames_after(states: evidence.States, pair: int, sizes: ModelConfig) -> np.ndarray:
    """What the episode shows of a state and of up to H after it: [1 .. H + 1, h, w, 3] uint8."""
    first, episode = states.decisions[pair], states.episode
    # The last frame follows a chunk that the episode's end may have cut.
    images = episode.observations.image[: 1 + len(episode) // sizes.chunk]
    return images[first : first + sizes.horizon + 1]


def pixel_distance(x: Array, y: Array) -> Array:
    """Root mean squared difference [] of two images."""
    return jnp.sqrt(jnp.mean((x - y) ** 2))


def _window_means(x: Array) -> Array:
    """Means of all whole windows: [h, w, 3] -> [h - 6, w - 6, 3]."""
    rows, columns = (side - WINDOW + 1 for side in x.shape[:2])
    x = sum(x[i : i + rows] for i in range(WINDOW))
    return sum(x[:, i : i + columns] for i in range(WINDOW)) / WINDOW**2


def ssim(x: Array, y: Array) -> Array:
    """Structural similarity [] of two images [h, w, 3] in [0, 1] (Wang et al., 2004).

    Windows are uniform, and covariances those of a sample: the defaults of scikit-image.
    """
    if min(x.shape[:2]) < WINDOW:
        raise ValueError(f"images of {x.shape[:2]} pixels have no window of {WINDOW} x {WINDOW}")
    mean_x, mean_y = _window_means(x), _window_means(y)
    sample = WINDOW**2 / (WINDOW**2 - 1)
    variances = sample * (_window_means(x**2) - mean_x**2 + _window_means(y**2) - mean_y**2)
    covariance = sample * (_window_means(x * y) - mean_x * mean_y)
    means = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    return jnp.mean(means * (2 * covariance + C2) / (variances + C2))


def ssim_distance(x: Array, y: Array) -> Array:
    """1 - SSIM [] of two images [h, w, 3]."""
    return 1 - ssim(x, y)


@functools.partial(jax.jit, static_argnames=("distance",))
def distances(images: Array, *, distance: Callable[[Array, Array], Array]) -> Array:
    """Distances [N, N] of all pairs of images [N, ...]; none of an image to itself."""
    count = images.shape[0]
    first, second = np.triu_indices(count, 1)

    def apart(pair: tuple[Array, Array]) -> Array:
        return distance(images[pair[0]], images[pair[1]])

    half = jax.lax.map(apart, (jnp.asarray(first), jnp.asarray(second)))
    upper = jnp.zeros((count, count)).at[first, second].set(half)
    return upper + upper.T


def mean_distance(apart: np.ndarray) -> float:
    """Mean over all pairs of distances [N, N]."""
    count = len(apart)
    return float(apart.sum() / (count * (count - 1)))


def least_alike(apart: np.ndarray, count: int) -> list[int]:
    """The two that are furthest apart, then each time the one furthest from its nearest chosen."""
    pairs = np.where(np.tri(len(apart), k=-1, dtype=bool).T, apart, -1)  # each once, none of one
    chosen = [int(i) for i in np.unravel_index(np.argmax(pairs), pairs.shape)]
    while len(chosen) < count:
        nearest = apart[chosen].min(axis=0)
        nearest[chosen] = -1  # also where all are the same
        chosen.append(int(np.argmax(nearest)))
    return chosen


def draw(out: Path, real: np.ndarray, futures: np.ndarray, title: str) -> None:
    """A row of real frames [1 .. H + 1, h, w, 3], and one of each future [N, H + 1, h, w, 3]."""
    rows, columns = len(futures) + 1, futures.shape[1]
    figure, panels = plt.subplots(
        rows, columns, figsize=(1.5 * columns + 0.6, 1.5 * rows + 0.6), layout="constrained"
    )
    named = [("real", real)] + [(f"future {n}", row) for n, row in enumerate(futures, 1)]
    for line, (name, images) in zip(panels, named, strict=True):
        line[0].set_ylabel(name)
        for panel, image in zip(line, images, strict=False):
            panel.imshow(image, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
        for panel in line[len(images) :]:  # the episode ended before
            panel.set_axis_off()
        for panel in line:  # without frames, too, as large as with them
            panel.set_box_aspect(futures.shape[2] / futures.shape[3])
    for h, panel in enumerate(panels[0]):
        panel.set_title(f"t + {h}" if h else "t", fontsize="medium")  # also above no frame
    figure.suptitle(title, fontsize="medium")
    figure.savefig(out, dpi=130)
    plt.close(figure)


def measure(
    latents: Array, images: Array, weights: lpips.Weights | None = None
) -> tuple[dict[str, float | None], np.ndarray]:
    """Mean distances of last latents [N, D] and their images, and those [N, N] in pixels."""
    apart = np.asarray(distances(images, distance=pixel_distance))
    similarity = np.asarray(distances(images, distance=ssim_distance))
    numbers: dict[str, float | None] = {
        "pixels": mean_distance(apart),
        "one_minus_ssim": mean_distance(similarity),
        "lpips": None,
        "latents": float(steps_sweep.spread(latents)),
    }
    if weights is not None:
        perceived = distances(lpips.embed(weights, images), distance=lpips.squared_distance)
        numbers["lpips"] = mean_distance(np.asarray(perceived))
    return numbers, apart


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over the pairs for each number of steps, the paper's LPIPS beside."""
    titles = ["agent", "steps", "pixels", "1 - SSIM", "LPIPS", "latents", "paper, CarRacing: LPIPS"]
    lines = []
    for steps in dict.fromkeys(row["steps"] for row in rows):
        own = [row for row in rows if row["steps"] == steps]
        measured = [
            "" if own[0][name] is None else f"{np.mean([row[name] for row in own]):.4f}"
            for name in ("pixels", "one_minus_ssim", "lpips", "latents")
        ]
        _, paper = steps_sweep.PAPER.get(("diffusion", steps), ("", ""))
        lines.append([Path(own[0]["agent"]).name, str(steps), *measured, paper])
    return evidence.markdown(titles, lines)


def open_both(name: str, directory: Path) -> tuple[Agent, Decoder, Params]:
    """The agent and the decoder of its latents.

    Raises:
        UsageError: if the agent imagines one future or none, or the decoder is not its own.
    """
    agent = evidence.load(name, "dynamics")
    dynamics = agent.config.model.dynamics
    if DYNAMICS[dynamics].step is not None:
        raise UsageError(f"{name} has {dynamics} dynamics: they imagine one future, whatever noise")
    return agent, *decoders.load_for(agent, name, directory)


def open_lpips(decoder: Decoder) -> lpips.Weights | None:
    """Its weights; none, and a sentence that says why, where there is no LPIPS of such images.

    Raises:
        UsageError: if the weights that are installed are not the right ones.
    """
    height, width = decoder.image
    if lpips.find() is None:
        why = lpips.MISSING
    elif min(height, width) < lpips.LEAST:
        why = f"images of {height} x {width} pixels are too small for it"
    else:
        return lpips.load()
    print(f"no LPIPS: {why}", file=sys.stderr)
    return None


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("agent", metavar="AGENT")
    parser.add_argument("decoder", type=Path, metavar="DECODER_DIR")
    parser.add_argument("--steps", type=int, nargs="+", default=[8], help="of diffusion")
    parser.add_argument("--rollouts", type=int, default=100, help="futures of each state and plan")
    parser.add_argument("--pairs", type=int, default=8, help="states, each with a plan")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(
        "--quick", action="store_true", help="a trial: 1 step, 2 pairs, a short episode"
    )
    arguments = evidence.parse(parser, argv, QUICK)
    for option, value, least in (
        ("--steps", min(arguments.steps), 1),
        ("--rollouts", arguments.rollouts, SHOWN),
        ("--pairs", arguments.pairs, 1),
    ):
        if value < least:
            raise UsageError(f"{option} is {value}; it must be at least {least}")
    return arguments


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    agent, decoder, decoder_params = open_both(arguments.agent, arguments.decoder)
    config = agent.config
    if arguments.quick:
        agent.config = config = config.replace(env={"max_steps": QUICK_STEPS})
    configs = [config.replace(planner={"diffusion_steps": steps}) for steps in arguments.steps]
    for each in configs:
        validate(each)
    for path in filter(None, (arguments.out, arguments.json)):
        check_writable(path)
    weights = open_lpips(decoder)

    states = evidence.states(agent, arguments.pairs)
    rows: list[dict[str, Any]] = []
    for each in configs:
        shown: dict[str, Any] = {"pixels": -1.0}
        latents = steps_sweep.imagine(
            agent.params,
            states.z,
            states.chunks,
            jax.random.key(0),
            config=each.graph,
            rollouts=arguments.rollouts,
        )
        for pair, decision in enumerate(states.decisions):
            last = latents[pair, :, -1]
            images = decoders.decode_all(decoder_params, last, decoder=decoder)
            numbers, apart = measure(last, images, weights)
            row = {
                "agent": arguments.agent,
                "decoder": str(arguments.decoder),
                "steps": each.planner.diffusion_steps,
                "pair": pair,
                "decision": decision,
                "rollouts": arguments.rollouts,
                "max_steps": config.env.max_steps,  # 0 for the environment's own limit
            }
            rows.append(row | numbers)
            if numbers["pixels"] > shown["pixels"]:
                shown = row | numbers | {"chosen": least_alike(apart, SHOWN)}
        if arguments.json:
            evidence.write(arguments.json, rows, [__file__, *argv])
    print(table(rows))

    pair, chosen = shown["pair"], np.array(shown["chosen"])
    start = jnp.broadcast_to(states.z[pair], (SHOWN, 1, states.z.shape[-1]))
    trajectories = jnp.concatenate([start, latents[pair, chosen]], axis=1)
    flat = trajectories.reshape(-1, trajectories.shape[-1])
    images = np.asarray(decoders.decode_all(decoder_params, flat, decoder=decoder))
    title = (
        f"{Path(arguments.agent).name}, diffusion steps: {shown['steps']}; "
        f"{SHOWN} of {arguments.rollouts} futures from decision t = {shown['decision']}; "
        f"environment steps a column: {config.model.chunk}"
    )
    futures = images.reshape(*trajectories.shape[:2], *images.shape[1:])
    draw(arguments.out, frames_after(states, pair, config.model), futures, title)
    return 0


if __name__ == "__main__":
    cli.run(main)
