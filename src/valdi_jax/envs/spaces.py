"""Conversion between an environment's observations and actions and the agent's."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import numpy as np

from valdi_jax.errors import UsageError
from valdi_jax.observation import Observation

_SMALLEST_IMAGE = 16  # smallest side of an image in pixels
_COARSE = 1e5  # from here on, float32 resolves less than 0.008


class Interface:
    """An agent's interface to an environment.

    Observations: a Box, or a Dict of Boxes with at most one image. An array of at most four axes is
    an image if two neighbouring ones, height and width, are at least 16; of uint8 and three axes
    also a smaller one. Channels come before or after these, and stacked frames, which become
    channels too, in front. Images become uint8 with
    channels last; float images are scaled from their bounds to 0 .. 255. All else is flattened and
    concatenated into one float32 vector, in the Dict's order.

    Actions: [A] in [-1, 1], scaled to the bounds of the environment's Box.

    Attributes:
        example: an all-zero observation.
        action_dim: action size A.

    Raises:
        UsageError: if the spaces are of another kind; the message suggests a wrapper.
    """

    def __init__(self, observations: gym.Space, actions: gym.Space):
        named = isinstance(observations, gym.spaces.Dict)
        spaces = (
            observations.spaces
            if isinstance(observations, gym.spaces.Dict)
            else {"observation": observations}
        )
        boxes: dict[str, gym.spaces.Box] = {}
        for name, space in spaces.items():
            if not isinstance(space, gym.spaces.Box):
                raise UsageError(f"the observation {name!r} {_not_a_box(space, alone=not named)}")
            boxes[name] = space
        images = [name for name, box in boxes.items() if _is_image(box)]
        if len(images) > 1:
            raise UsageError(
                f"the observations {' and '.join(map(repr, images))} are both images, and an agent "
                "has one: stack them along their channels in a gymnasium.ObservationWrapper"
            )
        self._named = named
        self._vectors = [name for name in boxes if name not in images]
        self._image = images[0] if images else None
        if images:
            self._image_box = boxes[images[0]]
            _check_image(images[0], self._image_box)
        if not boxes:
            raise UsageError("the environment has no observations")

        if not isinstance(actions, gym.Space):
            raise UsageError(f"the environment's actions are {_foreign(actions)}")
        if not isinstance(actions, gym.spaces.Box) or actions.dtype.kind != "f":
            raise UsageError(
                f"the environment's actions are discrete ({actions}), and Valdi is for continuous "
                "control: choose its continuous variant, or map a Box onto its actions in a "
                "gymnasium.ActionWrapper"
            )
        if not actions.is_bounded():
            raise UsageError(
                f"the environment's actions have infinite bounds ({actions}): give them finite "
                "ones in a gymnasium.ActionWrapper, e.g. gymnasium.wrappers.TransformAction"
            )
        self._actions = actions
        # Halved first, because the sum of two large bounds may overflow.
        self._centre = actions.high.astype(np.float64) / 2 + actions.low.astype(np.float64) / 2
        self._reach = actions.high.astype(np.float64) / 2 - actions.low.astype(np.float64) / 2

        self._boxes = boxes
        self._warned = False
        self.action_dim = int(np.prod(actions.shape))
        zeros = {name: np.zeros(box.shape, box.dtype) for name, box in boxes.items()}
        self.example = self.observe(zeros if named else zeros["observation"])

    def observe(self, observation: np.ndarray | dict[str, np.ndarray]) -> Observation:
        """Convert an observation of the environment to the agent's.

        Raises:
            ValueError: if its shape or type is not the space's, or a value is not finite in
                float32: it would stay in the replay buffer and the normaliser.
        """
        parts = self._parts(observation, several=False)
        image = vector = None
        if self._image is not None:
            image = _to_uint8(parts[self._image], self._image_box)
        if self._vectors:
            vector = self._vector({name: parts[name][None] for name in self._vectors})[0]
        return Observation(image=image, vector=vector)

    def observe_all(self, observations: np.ndarray | dict[str, np.ndarray]) -> Observation:
        """`observe` several observations [N, ...], or a dict of such arrays, at once."""
        parts = self._parts(observations, several=True)
        image = vector = None
        if self._image is not None:
            image = np.stack([_to_uint8(frame, self._image_box) for frame in parts[self._image]])
        if self._vectors:
            vector = self._vector({name: parts[name] for name in self._vectors})
        return Observation(image=image, vector=vector)

    def _parts(self, observation: Any, *, several: bool) -> dict[str, np.ndarray]:
        return {
            name: _part(observation, name if self._named else None, box, several=several)
            for name, box in self._boxes.items()
        }

    def _vector(self, parts: dict[str, np.ndarray]) -> np.ndarray:
        """Vectors [N, V] of the parts [N, ...]."""
        with np.errstate(over="ignore"):  # values too large are refused below
            flat = [part.astype(np.float32).reshape(len(part), -1) for part in parts.values()]
        vectors = np.concatenate(flat, axis=1)
        _check_finite(vectors)
        self._warn_of_lost_resolution(parts)
        return vectors

    def unobserve(self, vectors: np.ndarray) -> np.ndarray | dict[str, np.ndarray]:
        """Convert the agent's vectors [L, V] to the environment's observations, without an image.

        They are as exact as float32 holds them.
        """
        sizes = [int(np.prod(self._boxes[name].shape)) for name in self._vectors]
        parts = np.split(vectors, np.cumsum(sizes)[:-1], axis=1)
        named = {
            name: part.reshape(len(part), *self._boxes[name].shape).astype(self._boxes[name].dtype)
            for name, part in zip(self._vectors, parts, strict=True)
        }
        return named if self._named else named["observation"]

    def count(self, observation: Any) -> int | None:
        """How many observations there are along a leading axis; None for one without such."""
        name, box = next(iter(self._boxes.items()))
        if self._named:
            if not isinstance(observation, dict) or name not in observation:
                return None
            observation = observation[name]
        shape = np.shape(observation)
        return shape[0] if shape[1:] == box.shape and len(shape) == len(box.shape) + 1 else None

    def _warn_of_lost_resolution(self, parts: dict[str, np.ndarray]) -> None:
        for name, part in parts.items():
            if not self._warned and part.dtype == np.float64 and np.any(np.abs(part) > _COARSE):
                self._warned = True
                largest = float(np.abs(part).max())
                warnings.warn(
                    f"the observation {name!r} holds {largest:.6g}, of which float32 resolves "
                    f"steps of {np.spacing(np.float32(largest)):.2g}: subtract an offset in a "
                    "gymnasium.ObservationWrapper",
                    stacklevel=2,
                )

    def act(self, action: np.ndarray) -> np.ndarray:
        """Convert an action [A] of the agent to the environment's."""
        scaled = self._centre + self._reach * action.reshape(self._actions.shape)
        # Clip rounding errors.
        scaled = np.clip(scaled, self._actions.low, self._actions.high)
        return scaled.astype(self._actions.dtype)

    def unact(self, actions: np.ndarray) -> np.ndarray:
        """Convert actions [L, ...] of the environment to the agent's [L, A], clipped to [-1, 1].

        Raises:
            ValueError: if their shape or type is not the space's.
        """
        shape = self._actions.shape
        if actions.shape[1:] != shape or actions.dtype.kind != "f":
            raise ValueError(
                f"its actions have the shape {actions.shape} and type {actions.dtype}; each of the "
                f"environment's has the shape {shape} and type {self._actions.dtype}"
            )
        reach = np.where(self._reach > 0, self._reach, 1)
        scaled = (np.asarray(actions, np.float64) - self._centre) / reach
        return np.clip(scaled, -1, 1).reshape(len(actions), -1).astype(np.float32)


def _not_a_box(space: object, *, alone: bool) -> str:
    """Describe an observation that is not an array, and what to do."""
    if not isinstance(space, gym.Space):
        return f"is {_foreign(space)}"
    kind = type(space).__name__
    if alone:
        return (
            f"is of the kind {kind}, not an array (Box): wrap the environment in "
            "gymnasium.wrappers.FlattenObservation"
        )
    return (
        f"is of the kind {kind}, not an array (Box): give it as numbers (a Discrete as one-hot, a "
        "nested Dict as its parts) in a gymnasium.ObservationWrapper; FlattenObservation would "
        "flatten images too"
    )


def _foreign(space: object) -> str:
    kind = type(space)
    return (
        f"a space of another library ({kind.__module__}.{kind.__name__}), not Gymnasium's: wrap "
        "the environment with shimmy (https://shimmy.farama.org)"
    )


def _part(observation: Any, name: str | None, box: gym.spaces.Box, *, several: bool) -> np.ndarray:
    """One array of an observation, or of several, checked against its space."""
    what = "the environment's observation" if name is None else f"the observation {name!r}"
    if name is not None:
        if not isinstance(observation, dict) or name not in observation:
            raise ValueError(f"{what} is missing: the environment gave {_describe(observation)}")
        observation = observation[name]
    array = np.asarray(observation)
    shape = array.shape[1:] if several else array.shape
    if shape != box.shape or array.dtype.kind not in "biuf":
        raise ValueError(
            f"{what} has the shape {shape} and type {array.dtype}; its space says "
            f"{box.shape} and {box.dtype}"
        )
    if box.dtype == np.uint8 and array.dtype != np.uint8 and _is_image(box):
        raise ValueError(
            f"{what} is of {array.dtype}; its space says uint8: frames of 0 to 1 would turn black"
        )
    return array


def _describe(value: Any) -> str:
    keys = sorted(map(str, value)) if isinstance(value, dict) else None
    return f"a dict of {', '.join(keys)}"[:200] if keys is not None else type(value).__name__


def _check_finite(values: np.ndarray) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        raise ValueError(f"the environment's observation is not finite: {values[~finite][0]}")


def _image_axes(shape: tuple[int, ...]) -> tuple[int, int | None] | None:
    """Axes of an image's height (before its width) and channels; None if it is none.

    Channels come last unless the last two axes are the larger ones. The first of four axes is that
    of stacked frames.
    """
    rank = len(shape)
    if rank == 2:
        return (0, None) if min(shape) >= _SMALLEST_IMAGE else None
    if rank not in (3, 4):
        return None
    first = rank - 3
    channels_first = shape[first] < shape[-1] and min(shape[-2:]) >= _SMALLEST_IMAGE
    if channels_first:
        return first + 1, first
    # Bytes of three axes may be a small image.
    if rank == 4 and min(shape[first : first + 2]) < _SMALLEST_IMAGE:
        return None
    return first, rank - 1


def _is_image(box: gym.spaces.Box) -> bool:
    axes = _image_axes(box.shape)
    if axes is None:
        return False
    height, _ = axes
    return box.dtype == np.uint8 or min(box.shape[height : height + 2]) >= _SMALLEST_IMAGE


def _check_image(name: str, box: gym.spaces.Box) -> None:
    if box.dtype != np.uint8 and not box.is_bounded():
        raise UsageError(
            f"the image {name!r} has infinite bounds, so its range is unknown: rescale it to a Box "
            "of 0 to 1, or of uint8, in a gymnasium.ObservationWrapper"
        )
    if box.dtype != np.uint8 and not np.all(box.high > box.low):
        raise UsageError(f"the image {name!r} has pixels whose bounds leave them no range")


def _to_uint8(image: np.ndarray, box: gym.spaces.Box) -> np.ndarray:
    """Image of any dtype and layout -> uint8 [height, width, channels]."""
    if image.dtype != np.uint8:
        _check_finite(image)
        low, high = box.low.astype(np.float64), box.high.astype(np.float64)
        image = np.rint(255 * np.clip((image - low) / (high - low), 0, 1)).astype(np.uint8)
    axes = _image_axes(image.shape)
    assert axes is not None
    _, channels = axes
    image = image[..., None] if channels is None else np.moveaxis(image, channels, -1)
    if image.ndim == 4:  # stacked frames: [frames, height, width, channels]
        image = np.moveaxis(image, 0, -2).reshape(*image.shape[1:3], -1)
    return np.array(image)  # a copy: an environment may reuse its buffer
