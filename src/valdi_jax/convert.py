"""Import the weights of the authors' PyTorch implementation.

``python -m valdi_jax.convert CHECKPOINT.pth OUT`` writes a directory that ``evaluate`` accepts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax import model
from valdi_jax.config import Config
from valdi_jax.types import Observation, Params

Path = tuple[str, ...]


def _linear(ours: Path, theirs: str, bias: bool = True) -> Iterator[tuple[Path, str]]:
    yield (*ours, "dense", "kernel"), f"{theirs}.weight"
    if bias:
        yield (*ours, "dense", "bias"), f"{theirs}.bias"


def _norm(ours: Path, theirs: str, bias: bool = True) -> Iterator[tuple[Path, str]]:
    yield (*ours, "scale"), f"{theirs}.weight"
    if bias:
        yield (*ours, "bias"), f"{theirs}.bias"


def _residual_mlp(ours: Path, theirs: str, depth: int) -> Iterator[tuple[Path, str]]:
    yield from _linear((*ours, "inputs"), f"{theirs}.layers.0")
    for i in range(depth):
        block = f"{theirs}.layers.{i + 1}.layers"
        yield from _norm((*ours, f"norm_{i}"), f"{block}.0")
        yield from _linear((*ours, f"block_{i}", "linear_0"), f"{block}.1")
        yield from _linear((*ours, f"block_{i}", "linear_1"), f"{block}.3")
    yield from _linear((*ours, "outputs"), f"{theirs}.layers.{depth + 1}")


def _transformer(depth: int) -> Iterator[tuple[Path, str]]:
    yield ("dynamics", "condition_marker"), "dynamics.condition_state_marker"
    yield ("dynamics", "target_markers"), "dynamics.target_state_marker"
    yield ("dynamics", "timestep_embedding"), "dynamics.diffusion_step_emb.weight"
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


def parameter_names(config: Config) -> dict[Path, str]:
    """The reference's name for every parameter of ours, by its path in the parameter dict."""

    def pairs() -> Iterator[tuple[Path, str]]:
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
        yield from _residual_mlp(("reward", "net"), "reward", config.model.reward_depth)
        for head in range(config.model.value_heads):
            for i in range(3):
                ours = ("value", f"head_{head}", f"linear_{i}")
                yield from _linear(ours, f"vs.models.{head}.{2 * i}")

    return dict(pairs())


def _to_ours(tensor: np.ndarray, path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Linear weights are stored [out, in] there, convolutions [out, in, height, width]."""
    if path[-1] == "kernel":
        tensor = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
    elif path[-1].endswith("_marker") or path[-1].endswith("_markers"):
        tensor = tensor[0] if tensor.ndim == len(shape) + 1 else tensor
    return tensor


def params_from_reference(tensors: Mapping[str, np.ndarray], config: Config) -> Params:
    """Our parameters from tensors under the reference's names.

    Args:
        tensors: every tensor of one network set, e.g. ``{"reward.layers.0.weight": ...}``.
        config: the configuration they belong to (``model.dynamics`` decides the world model).

    Returns: the nested parameter dict, float32.

    Raises:
        ValueError: naming the first tensor that is missing, left over, of another shape or not
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

    template = jax.eval_shape(
        lambda key: model.init_params(key, reference_observation(), config=config),
        jax.random.key(0),
    )
    return jax.tree_util.tree_map_with_path(convert, template)


def reference_observation() -> Observation:
    """An all-zero observation of the CarRacing agent, the only one the reference knows."""
    return Observation(
        image=np.zeros((96, 96, 3), np.uint8), vector=np.zeros(7, np.float32)
    )
