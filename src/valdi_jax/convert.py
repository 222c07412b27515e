"""Import the weights of the authors' PyTorch implementation.

``python -m valdi_jax.convert CHECKPOINT.pth OUT`` writes a directory that ``evaluate`` accepts.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from valdi_jax import cli, model
from valdi_jax.config import Config, validate
from valdi_jax.dynamics import DYNAMICS
from valdi_jax.errors import UsageError
from valdi_jax.observation import Observation
from valdi_jax.presets import PRESETS
from valdi_jax.run import checkpoint, rundir
from valdi_jax.types import Params

ParamPath = tuple[str, ...]


def _linear(ours: ParamPath, theirs: str, bias: bool = True) -> Iterator[tuple[ParamPath, str]]:
    yield (*ours, "dense", "kernel"), f"{theirs}.weight"
    if bias:
        yield (*ours, "dense", "bias"), f"{theirs}.bias"


def _norm(ours: ParamPath, theirs: str, bias: bool = True) -> Iterator[tuple[ParamPath, str]]:
    yield (*ours, "scale"), f"{theirs}.weight"
    if bias:
        yield (*ours, "bias"), f"{theirs}.bias"


def _residual_mlp(ours: ParamPath, theirs: str, depth: int) -> Iterator[tuple[ParamPath, str]]:
    yield from _linear((*ours, "inputs"), f"{theirs}.layers.0")
    for i in range(depth):
        block = f"{theirs}.layers.{i + 1}.layers"
        yield from _norm((*ours, f"norm_{i}"), f"{block}.0")
        yield from _linear((*ours, f"block_{i}", "linear_0"), f"{block}.1")
        yield from _linear((*ours, f"block_{i}", "linear_1"), f"{block}.3")
    yield from _linear((*ours, "outputs"), f"{theirs}.layers.{depth + 1}")


def _time_embedding(dynamics: str) -> Iterator[tuple[ParamPath, str]]:
    if dynamics == "diffusion":
        yield ("dynamics", "timestep_embedding"), "dynamics.diffusion_step_emb.weight"
        return
    for i in range(2):
        ours = ("dynamics", "time_embedding", f"linear_{i}")
        yield from _linear(ours, f"dynamics.time_emb.proj.{2 * i}")


def _transformer(depth: int) -> Iterator[tuple[ParamPath, str]]:
    yield ("dynamics", "condition_marker"), "dynamics.condition_state_marker"
    yield ("dynamics", "target_markers"), "dynamics.target_state_marker"
    for i in range(depth):
        ours, theirs = ("dynamics", f"block_{i}"), f"dynamics.layers.{i}"
        yield from _norm((*ours, "attention_norm"), f"{theirs}.ln_1", bias=False)
        yield from _linear((*ours, "qkv"), f"{theirs}.attn.qkv", bias=False)
        yield from _linear((*ours, "projection"), f"{theirs}.attn.proj", bias=False)
        yield from _norm((*ours, "mlp_norm"), f"{theirs}.ln_2", bias=False)
        yield from _linear((*ours, "mlp_in"), f"{theirs}.mlp.c_fc", bias=False)
        yield from _linear((*ours, "mlp_out"), f"{theirs}.mlp.c_proj", bias=False)
    yield from _norm(("dynamics", "norm"), f"dynamics.layers.{depth}", bias=False)
    yield from _linear(("dynamics", "velocity"), f"dynamics.layers.{depth + 1}", bias=False)


def parameter_names(config: Config) -> dict[ParamPath, str]:
    """The reference's name of every parameter, by its path in our parameter dict."""

    def pairs() -> Iterator[tuple[ParamPath, str]]:
        for i in range(len(config.model.cnn_channels)):
            ours, theirs = ("encoder", f"conv_{i}", "conv"), f"encoder.visual_encoder.{2 * i}"
            yield (*ours, "kernel"), f"{theirs}.weight"
            yield (*ours, "bias"), f"{theirs}.bias"
        yield from _linear(("encoder", "image_embedding"), "encoder.visual_encoder.11")
        for i in range(2):
            ours = ("encoder", "vector_embedding", f"linear_{i}")
            yield from _linear(ours, f"encoder.proprio_encoder.{2 * i}")
        yield from _norm(("encoder", "head_norm"), "encoder.head.0")
        yield from _linear(("encoder", "head", "linear_0"), "encoder.head.1")
        yield from _linear(("encoder", "head", "linear_1"), "encoder.head.3")
        if config.model.dynamics == "mlp":
            yield from _residual_mlp(("dynamics", "net"), "dynamics", config.model.mlp_depth)
        else:
            yield from _transformer(config.model.transformer_depth)
            yield from _time_embedding(config.model.dynamics)
        yield from _residual_mlp(("reward", "net"), "reward", config.model.reward_depth)
        for head in range(config.model.value_heads):
            for i in range(3):
                ours = ("value", f"head_{head}", f"linear_{i}")
                yield from _linear(ours, f"vs.models.{head}.{2 * i}")

    return dict(pairs())


def _to_ours(tensor: np.ndarray, path: ParamPath, shape: tuple[int, ...]) -> np.ndarray:
    """Reorder linear weights [out, in] and convolutions [out, in, height, width]."""
    if path[-1] == "kernel":
        tensor = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
    elif path[-1].endswith("_marker") or path[-1].endswith("_markers"):
        tensor = tensor[0] if tensor.ndim == len(shape) + 1 else tensor
    return tensor


def params_from_reference(tensors: Mapping[str, np.ndarray], config: Config) -> Params:
    """Our parameters from tensors under the reference's names.

    Args:
        tensors: every tensor of one set of networks, e.g. ``{"reward.layers.0.weight": ...}``.
        config: their configuration (``model.dynamics`` decides the world model).

    Returns: the nested parameter dict, float32.

    Raises:
        ValueError: naming the first tensor that is missing, unknown, of another shape or not
            finite.
    """
    names = parameter_names(config)
    missing = [name for name in names.values() if name not in tensors]
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing, the first is {missing[0]!r}")
    unknown = sorted(set(tensors) - set(names.values()))
    if unknown:
        raise ValueError(
            f"{len(unknown)} tensors do not belong to a {config.model.dynamics} model, "
            f"the first is {unknown[0]!r}"
        )

    def convert(path, template: jax.ShapeDtypeStruct) -> jax.Array:
        keys = tuple(entry.key for entry in path)
        name = names[keys]
        tensor = _to_ours(np.asarray(tensors[name], np.float32), keys, template.shape)
        if tensor.shape != template.shape:
            raise ValueError(
                f"{name!r} has shape {np.shape(tensors[name])}, which does not fit "
                f"{'/'.join(keys)} {template.shape}"
            )
        if not np.isfinite(tensor).all():
            raise ValueError(f"{name!r} holds values that are not finite")
        return jnp.asarray(tensor)

    template = model.params_shapes(reference_observation(), config=config)
    return jax.tree_util.tree_map_with_path(convert, template)


def reference_observation() -> Observation:
    """An all-zero observation of CarRacing, the reference's only environment."""
    return Observation(image=np.zeros((96, 96, 3), np.uint8), vector=np.zeros(7, np.float32))


def config_from_reference(settings: Mapping[str, Any]) -> Config:
    """Our configuration from the settings in a reference checkpoint.

    Raises:
        UsageError: if its dynamics is unknown, or a setting is not a number.
    """
    paper = PRESETS["paper"]
    ours = {
        "model": {
            "latent_dim": "state_representation_dim",
            "horizon": "horizon",
            "chunk": "act_chunks",
            "action_dim": "act_dim",
            "diffusion_timesteps": "diff_steps",
        },
        "planner": {
            "candidates": "pop_size",
            "elites": "n_elite",
            "iterations": "n_iters",
            "diffusion_steps": "num_diff_steps",
        },
        "learn": {"discount": "gamma", "learning_rate": "lr"},
    }
    dynamics = str(settings.get("dynamics_type", "diffusion"))
    DYNAMICS[dynamics]
    sections = {}
    for section, names in ours.items():
        defaults = getattr(paper, section)
        values = {}
        for name, theirs in names.items():
            kind = type(getattr(defaults, name))
            value = settings.get(theirs, getattr(defaults, name))
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not abs(value) < 1e9 or kind(value) != value:
                wanted = "an integer" if kind is int else "a number"
                raise UsageError(
                    f"setting {theirs!r} of the checkpoint is {reprlib.repr(value)}, not {wanted}"
                )
            values[name] = kind(value)
        sections[section] = dataclasses.replace(defaults, **values)
    model_config = dataclasses.replace(sections["model"], dynamics=dynamics)
    config = dataclasses.replace(paper, **{**sections, "model": model_config})
    validate(config)
    return config


def read_checkpoint(path: Path) -> tuple[dict[str, np.ndarray], Config]:
    """Tensors and configuration of a reference checkpoint.

    Only tensors and plain data are read (``weights_only=True``); nothing in the file is executed.

    Raises:
        UsageError: if torch is missing or too old, or the file is not such a checkpoint.
    """
    try:
        import torch

        version = importlib.metadata.version("torch")
    except ImportError:
        raise UsageError("reading .pth files needs: pip install 'valdi-jax[torch]'") from None
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < (2, 10):
        raise UsageError(f"reading .pth files safely needs torch 2.10 or later, not {version}")
    if not path.is_file():
        raise UsageError(f"{path} is not a file")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # many kinds, for a damaged, hostile or foreign file
        raise UsageError(f"{path} is not a checkpoint of tensors and plain data") from None
    if not isinstance(stored, dict) or not isinstance(stored.get("model"), dict):
        raise UsageError(f"{path} is not a checkpoint of the reference: it has no 'model'")
    settings = stored.get("cfg", {})
    if not isinstance(settings, dict):
        raise UsageError(f"{path} is not a checkpoint of the reference: its 'cfg' is not a table")
    # The reference stores the noise schedule; ours follows from the configuration.
    tensors = {}
    for name, tensor in stored["model"].items():
        if not isinstance(tensor, torch.Tensor) or name == "alphas_cumprod":
            continue
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
        # Repeated by a stride of 0, a small file could ask for any amount of memory.
        dense = (
            dense and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
        )
        if not dense or not tensor.dtype.is_floating_point or not isinstance(name, str):
            raise UsageError(
                f"{path}: {name!r} is no dense tensor of real numbers ({tensor.dtype})"
            )
        tensors[name] = tensor.detach().to(torch.float32).numpy()
    return tensors, config_from_reference(settings)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line of the conversion command."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT.pth")]
    """Checkpoint file of the authors' implementation."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Run directory to create."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    arguments = cli.parse(
        Arguments,
        argv,
        prog="python -m valdi_jax.convert",
        description="Import a checkpoint of the authors' PyTorch implementation.",
    )
    tensors, config = read_checkpoint(arguments.checkpoint)
    try:
        params = params_from_reference(tensors, config)
    except ValueError as error:
        raise UsageError(f"{arguments.checkpoint}: {error}") from error
    with rundir.lock(arguments.out):
        checkpoint.create_run(arguments.out, config)
        checkpoint.save_params(arguments.out, params)
    print(f"{arguments.out}: {model.parameter_count(params):,} parameters")
    return 0


if __name__ == "__main__":
    cli.run(main)
