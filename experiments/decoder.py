"""Train a pixel decoder on an agent's frozen latents, from its own driving.

python experiments/decoder.py AGENT --episodes 50 --validation 5 --epochs 20 --out DIR

AGENT is a run, a checkpoint, an exported or a bundled agent that sees images. DIR gets the decoder
(decoder.safetensors, decoder.json), its error after every epoch (metrics.jsonl), and samples.png:
frames of the validation episodes above what is decoded from their latents. Errors are squared, and
means over pixels in [0, 1]. Ctrl-C in training keeps what has been learned.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import platform
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import evidence
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from flax import traverse_util
from matplotlib.image import imsave
from rich.progress import Progress
from safetensors import SafetensorError

import valdi_jax
from valdi_jax import Agent, cli, compilation, model
from valdi_jax.data.rollout import Job, Rollout, roll_out
from valdi_jax.envs import evaluation_seeds, interface_of, make_env, own_env
from valdi_jax.envs.workers import make_pool
from valdi_jax.errors import UsageError
from valdi_jax.networks.decoder import CHANNELS, Decoder, decode, init_decoder
from valdi_jax.run.agents import packaged
from valdi_jax.run.log import to_line
from valdi_jax.run.manifest import (
    content_digest,
    file_digest,
    read_signed,
    write_atomic,
    write_signed,
)

RECORD, TENSORS = "decoder.json", "decoder.safetensors"
METRICS, SAMPLES = "metrics.jsonl", "samples.png"
SHIPPED = Path(__file__).parent / "decoders"
ENCODED = 64  # frames per pass of the encoder
DECODED = 16  # images per pass: attention over their patches is what takes the memory
QUICK = {"episodes": 2, "validation": 1, "epochs": 2}
QUICK_STEPS = 60


class Frames(NamedTuple):
    """Frames and their latents."""

    latents: np.ndarray  # [F, D] float32
    images: np.ndarray  # [F, height, width, 3] uint8


def make_jobs(count: int, seed: int) -> list[Job]:
    """Episodes to drive, none of them one of the 100 fixed ones of evaluation."""
    fixed = evaluation_seeds(100)
    draws = np.random.default_rng([2, seed]).integers(2**31 - 1, size=count + len(fixed))
    seeds = [int(draw) for draw in draws if draw not in fixed][:count]
    key = jax.random.key(seed)
    return [Job(seed, jax.random.fold_in(key, number)) for number, seed in enumerate(seeds)]


def drive(
    agent: Agent,
    jobs: Sequence[Job],
    *,
    noise: float,
    num_envs: int,
    on_decision: Callable[[], None],
) -> list[Rollout]:
    """Roll out the agent with exploration noise; an episode holds the frames that it planned from.

    Raises:
        UsageError: if it sees no images, or none that a decoder can draw.
    """
    config = agent.config
    factory = functools.partial(own_env, make_env, config.env, training=True)
    example = interface_of(factory).example
    if example.image is None:
        raise UsageError(f"the agent of {config.env.name} sees no images: nothing to decode")
    *sides, channels = example.image.shape
    if channels != CHANNELS or any(side % Decoder.patch for side in sides):
        raise UsageError(
            f"the agent's frames have the shape {example.image.shape}: a decoder draws {CHANNELS} "
            f"channels, in patches of {Decoder.patch} x {Decoder.patch} pixels"
        )
    pool = make_pool(
        factory,
        num_envs,
        example=example,
        chunk=config.model.chunk,
        last_only=True,
        timeout=config.collect.worker_timeout,
    )
    try:
        return roll_out(
            agent.params, pool, jobs, config=config, noise_std=noise, on_decision=on_decision
        )
    finally:
        pool.close()


@functools.partial(jax.jit, static_argnames=("config",))
def encode(params, observations, *, config) -> jax.Array:
    """Latents [F, D] of observations [F, ...]."""
    one = functools.partial(model.encode, params, config=config)
    return jax.lax.map(one, observations, batch_size=ENCODED)


def encode_frames(agent: Agent, rollouts: Sequence[Rollout], training: int) -> tuple[Frames, ...]:
    """Frames of the first ``training`` rollouts, and of the others."""
    episodes = [rollout.episode.observations for rollout in rollouts]
    together = jax.tree.map(lambda *x: np.concatenate(x), *episodes)
    latents = np.asarray(encode(agent.params, together, config=agent.config.graph))
    first = sum(len(episode.image) for episode in episodes[:training])
    return tuple(
        Frames(latents[part], together.image[part]) for part in (slice(first), slice(first, None))
    )


def squared_errors(params, z, images, *, decoder: Decoder) -> jax.Array:
    """Errors [B] of images decoded from latents [B, D]."""
    difference = decode(params, z, decoder=decoder) - images / 255
    return jnp.square(difference).mean(axis=(-3, -2, -1))


@functools.partial(jax.jit, static_argnames=("decoder",))
def update(params, optimizer, z, images, learning_rate, *, decoder: Decoder):
    """One step of Adam: parameters, its state, and the loss before it."""

    def loss(params):
        return squared_errors(params, z, images, decoder=decoder).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    change, optimizer = optax.scale_by_adam().update(gradient, optimizer)
    return optax.apply_updates(params, optax.tree.scale(-learning_rate, change)), optimizer, value


_errors = jax.jit(squared_errors, static_argnames=("decoder",))


def mean_error(params, frames: Frames, *, decoder: Decoder, batch_size: int) -> float:
    count, total = len(frames.images), 0.0
    for first in range(0, count, batch_size):
        rows = np.arange(first, first + batch_size) % count  # no other batch size compiles
        errors = _errors(params, frames.latents[rows], frames.images[rows], decoder=decoder)
        total += float(errors[: count - first].sum())
    return total / count


def constant_error(training: Frames, validation: Frames) -> float:
    """Validation error of the mean training frame: what a decoder blind to the latent can reach."""
    mean = training.images.mean(axis=0) / 255
    return float(np.mean([np.square(image / 255 - mean).mean() for image in validation.images]))


def fit(
    params,
    training: Frames,
    validation: Frames,
    *,
    decoder: Decoder,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    on_update: Callable[[], None] = lambda: None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda record: None,
) -> tuple[Any, dict[str, Any]]:
    """Train a decoder with Adam; the learning rate falls to 0 as a cosine.

    ``on_update`` is called before every update. If it raises `cli.Interrupted`, the epoch ends
    there and is the last; without an update in it, it does not count.

    Returns: the parameters, and the last epoch's record; it is empty if there was no update.
    """
    rng = np.random.default_rng(seed)
    optimizer = optax.scale_by_adam().init(params)
    falling = optax.cosine_decay_schedule(
        learning_rate, max(epochs * (len(training.images) // batch_size), 1)
    )
    start, updates, stopped = time.monotonic(), 0, False
    record: dict[str, Any] = {}
    for epoch in range(1, epochs + 1):
        order = rng.permutation(len(training.images))
        whole = order[: len(order) // batch_size * batch_size]  # each epoch drops other frames
        losses = []
        try:
            for rows in whole.reshape(-1, batch_size):
                on_update()
                params, optimizer, loss = update(
                    params,
                    optimizer,
                    training.latents[rows],
                    training.images[rows],
                    np.float32(falling(updates + len(losses))),
                    decoder=decoder,
                )
                losses.append(loss)
        except cli.Interrupted:
            stopped = True
        if losses:
            updates += len(losses)
            record = {
                "epoch": epoch,
                "updates": updates,
                "loss/train": float(np.mean(jax.device_get(losses))),
                "loss/validation": mean_error(
                    params, validation, decoder=decoder, batch_size=batch_size
                ),
                "time/seconds": time.monotonic() - start,
            }
            on_epoch(record)
        if stopped:
            break
    return params, record


def draw_samples(path: Path, params, frames: Frames, *, decoder: Decoder, count: int = 8) -> None:
    """A row of true frames, evenly spaced over all, above a row of the decoded ones."""
    rows = np.linspace(0, len(frames.images) - 1, count).astype(int)
    decoded = np.asarray(decode(params, jnp.asarray(frames.latents[rows]), decoder=decoder))
    pictures = np.stack([frames.images[rows], np.round(255 * decoded).astype(np.uint8)])
    scale = max(1, 192 // pictures.shape[2])
    pictures = pictures.repeat(scale, axis=2).repeat(scale, axis=3)
    pictures = np.pad(pictures, ((0, 0), (0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255)
    imsave(path, np.concatenate([np.concatenate(list(row), axis=1) for row in pictures]))


def save(directory: Path, params, record: dict[str, Any], *, decoder: Decoder, half: bool) -> None:
    """Write a decoder and the record of its training, in float16 with ``half``.

    Raises:
        UsageError: if it cannot be written, or a parameter is not finite.
    """
    tensors = {}
    for name, value in traverse_util.flatten_dict(jax.device_get(params), sep=".").items():
        with np.errstate(over="ignore"):  # what is too large is refused here
            tensors[name] = np.asarray(value, np.float16 if half else np.float32)
        if not np.isfinite(tensors[name]).all():
            raise UsageError(f"{name} is not finite{' in float16' if half else ''}")
    sizes = {
        field.name: getattr(decoder, field.name)
        for field in dataclasses.fields(decoder)
        if field.name not in ("parent", "name")  # of every flax module
    }
    try:
        write_atomic(directory / TENSORS, safetensors.numpy.save(tensors))
        body = {
            "decoder": sizes,
            "latent_dim": len(tensors["latent.dense.kernel"]),
            "parameters": sum(array.size for array in tensors.values()),
            "tensors_sha256": file_digest(directory / TENSORS),
        }
        write_signed(directory / RECORD, record | body)
    except OSError as error:
        raise UsageError(f"cannot write {directory}: {error.strerror}") from error


def load(directory: Path | str) -> tuple[Decoder, Any, dict[str, Any]]:
    """Read a decoder: its sizes, float32 parameters and record.

    Raises:
        UsageError: if it is damaged or none.
    """
    directory = Path(directory)
    try:
        record = read_signed(directory / RECORD)
        if file_digest(directory / TENSORS) != record["tensors_sha256"]:
            raise ValueError(f"{TENSORS} differs from its checksum")
        sizes = record["decoder"]
        decoder = Decoder(**sizes | {"image": tuple(sizes["image"])})
        expected = jax.eval_shape(
            lambda key: init_decoder(key, record["latent_dim"], decoder=decoder), jax.random.key(0)
        )
        shapes = {
            name: x.shape for name, x in traverse_util.flatten_dict(expected, sep=".").items()
        }
        tensors = safetensors.numpy.load_file(directory / TENSORS)
        if {name: array.shape for name, array in tensors.items()} != shapes:
            raise ValueError("the tensors do not have the sizes of its record")
        for name, array in tensors.items():
            if array.dtype not in (np.float16, np.float32) or not np.isfinite(array).all():
                raise ValueError(f"{name} does not hold finite numbers of float16 or float32")
            tensors[name] = array.astype(np.float32)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{directory} is not a whole decoder: {error}") from error
    return decoder, traverse_util.unflatten_dict(tensors, sep="."), record


def encoder_digest(agent: Agent) -> str:
    """What an agent's latents come from, and so which decoder is its own."""
    parts = ("encoder", "normalizer")
    return content_digest({part: agent.params[part] for part in parts if part in agent.params})


def load_for(agent: Agent, name: str, directory: Path) -> tuple[Decoder, Any]:
    """Read the decoder of an agent's latents: its sizes and parameters.

    Raises:
        UsageError: if it is damaged or none, or of another encoder's latents.
    """
    decoder, params, record = load(directory)
    if record.get("encoder_sha256") != encoder_digest(agent):
        raise UsageError(
            f"{directory} decodes latents of another encoder than that of {name}: it was trained "
            f"for {record.get('agent')}; train one with decoder.py"
        )
    return decoder, params


def shipped(name: str) -> Path | None:
    """Directory of a bundled agent's decoder, if there is one beside this script."""
    bundled = name in packaged() and not Path(name).exists()
    return SHIPPED / name if bundled and (SHIPPED / name).exists() else None


@functools.partial(jax.jit, static_argnames=("decoder",))
def decode_all(params, latents: jax.Array, *, decoder: Decoder) -> jax.Array:
    """Images [N, height, width, 3] of latents [N, D], a few at a time."""
    one = functools.partial(decode, params, decoder=decoder)
    return jax.lax.map(one, latents, batch_size=DECODED)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("agent", metavar="AGENT")
    parser.add_argument("--episodes", type=int, default=50, help="to train on")
    parser.add_argument("--validation", type=int, default=5, help="episodes held out")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--noise", type=float, default=0.1, help="exploration noise, before tanh")
    parser.add_argument("--num-envs", type=int, default=1, help="environments driven in parallel")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--half", action="store_true", help="store float16")
    parser.add_argument("--quick", action="store_true", help="a trial of a minute")
    arguments = evidence.parse(parser, argv, QUICK)
    for name in ("episodes", "validation", "epochs", "num_envs", "batch_size", "learning_rate"):
        value = getattr(arguments, name)
        if not value > 0:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    for name in ("noise", "seed"):
        value = getattr(arguments, name)
        if not value >= 0:
            raise UsageError(f"--{name} is {value}; it must not be negative")
    return arguments


def make_directory(directory: Path) -> None:
    """Make the output directory.

    Raises:
        UsageError: if it holds files of this script already, or cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {directory}: {error.strerror}") from error
    for name in (RECORD, TENSORS, METRICS, SAMPLES):
        if (directory / name).exists():
            raise UsageError(f"{directory} holds {name} already: give a new directory")


def collect(
    agent: Agent, arguments: argparse.Namespace, bar: Progress, interrupt: Callable[[], None]
) -> tuple[Frames, Frames, dict[str, Any]]:
    """Drive; the frames to train on, those held out, and a record of both."""
    config = agent.config
    jobs = make_jobs(arguments.episodes + arguments.validation, arguments.seed)
    decisions = -(-config.episode_steps // config.model.chunk) * len(jobs) / arguments.num_envs
    task = bar.add_task("driving", total=decisions or None)

    def on_decision() -> None:
        interrupt()
        bar.advance(task)

    noise, num_envs = arguments.noise, arguments.num_envs
    rollouts = drive(agent, jobs, noise=noise, num_envs=num_envs, on_decision=on_decision)
    bar.remove_task(task)
    training, validation = encode_frames(agent, rollouts, arguments.episodes)
    record = {
        "environment": config.env.name,
        "episodes": arguments.episodes,
        "validation_episodes": arguments.validation,
        "frames": len(training.images),
        "validation_frames": len(validation.images),
        "noise": noise,
        "mean_return": float(np.mean([rollout.episode.episode_return for rollout in rollouts])),
        "constant_error": constant_error(training, validation),
    }
    return training, validation, record


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    compilation.cache_compilations()
    agent = Agent.load(arguments.agent)
    if arguments.quick:
        agent.config = agent.config.replace(env={"max_steps": QUICK_STEPS})
    directory, epochs = arguments.out, arguments.epochs
    make_directory(directory)
    with cli.interruptible() as interrupt, Progress(transient=True) as bar:

        def say(text: str) -> None:
            bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

        try:
            training, validation, data = collect(agent, arguments, bar, interrupt)
        except cli.Interrupted:
            raise KeyboardInterrupt from None  # nothing to keep yet
        say(
            f"{data['frames']} frames to train on and {data['validation_frames']} held out, mean "
            f"return {data['mean_return']:.1f}; the mean frame's error {data['constant_error']:.5f}"
        )
        height, width = training.images.shape[1:3]
        decoder = Decoder((height, width), **({"depth": 1} if arguments.quick else {}))
        key = jax.random.key(arguments.seed)
        batch_size = min(arguments.batch_size, len(training.images))
        updates = epochs * (len(training.images) // batch_size)
        task = bar.add_task("training", total=updates)

        def on_update() -> None:
            interrupt()
            bar.advance(task)

        def on_epoch(record: dict[str, Any]) -> None:
            with open(directory / METRICS, "ab") as file:
                file.write(to_line(record))
            say(
                f"epoch {record['epoch']}/{epochs}: error {record['loss/train']:.5f}, held out "
                f"{record['loss/validation']:.5f}"
            )

        params, last = fit(
            init_decoder(key, training.latents.shape[-1], decoder=decoder),
            training,
            validation,
            decoder=decoder,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=arguments.learning_rate,
            seed=arguments.seed,
            on_update=on_update,
            on_epoch=on_epoch,
        )
        if not last:
            raise KeyboardInterrupt  # before the first update

    record = {
        "agent": arguments.agent,
        "encoder_sha256": encoder_digest(agent),  # its latents are what the decoder takes
        "data": data,
        "trained": {
            "epochs": last["epoch"],
            "updates": last["updates"],
            "batch_size": batch_size,
            "learning_rate": arguments.learning_rate,
            "seed": arguments.seed,
            "seconds": round(last["time/seconds"], 1),
        },
        "errors": {"train": last["loss/train"], "validation": last["loss/validation"]},
        "command": shlex.join(["python", "experiments/decoder.py", *argv]),
        "versions": {
            "valdi_jax": valdi_jax.__version__,
            "jax": jax.__version__,
            "flax": flax.__version__,
            "python": platform.python_version(),
        },
    }
    save(directory, params, record, decoder=decoder, half=arguments.half)
    decoder, params, stored = load(directory)  # what is drawn is what was stored
    draw_samples(directory / SAMPLES, params, validation, decoder=decoder)
    size = (directory / TENSORS).stat().st_size
    print(f"{directory}: {stored['parameters']:,} parameters, {size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    cli.run(main)
