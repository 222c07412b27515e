"""Between an environment's own observations and actions and the agent's."""

from __future__ import annotations

import gymnasium as gym
import numpy as np

from valdi_jax.errors import UsageError
from valdi_jax.observation import Observation

_CHANNELS = 4  # at most, for the first axis of an image to be its channels
_SMALLEST_IMAGE = 16  # pixels of each side, for an array of two axes to be an image


class Interface:
    """What an agent sees and does in an environment.

    Observations: a Box, or a Dict of Boxes of which at most one is an image. An array of three axes
    is an image (channels last, or first where only that can be), and so is one of two axes that are
    both at least 16. Images become uint8 with channels last; float images are scaled from their
    bounds to 0 .. 255. All else is flattened and joined to one float32 vector, in the Dict's order.

    Actions: [A] in [-1, 1], scaled to the bounds of the environment's Box.

    Attributes:
        example: an all-zero observation.
        action_dim: action size A.

    Raises:
        UsageError: if the spaces are of another kind, saying what to do.
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
                raise UsageError(
                    f"the observation {name!r} is of the kind {type(space).__name__}, not an array "
                    "(Box): wrap the environment in gymnasium.wrappers.FlattenObservation"
                )
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
        self._centre = (actions.high.astype(np.float64) + actions.low) / 2
        self._reach = (actions.high.astype(np.float64) - actions.low) / 2

        self.action_dim = int(np.prod(actions.shape))
        zeros = {name: np.zeros(box.shape, box.dtype) for name, box in boxes.items()}
        self.example = self.observe(zeros if named else zeros["observation"])

    def observe(self, observation: np.ndarray | dict[str, np.ndarray]) -> Observation:
        """An observation of the environment as the agent sees it.

        Raises:
            ValueError: if it holds a value that is not finite: it would stay in the replay and in
                the normalisation for good.
        """
        parts = observation if self._named else {"observation": observation}
        image = vector = None
        if self._image is not None:
            image = _to_uint8(np.asarray(parts[self._image]), self._image_box)
        if self._vectors:
            flat = [np.asarray(parts[name], np.float32).ravel() for name in self._vectors]
            vector = np.concatenate(flat)
            _check_finite(vector)
        return Observation(image=image, vector=vector)

    def act(self, action: np.ndarray) -> np.ndarray:
        """An action [A] of the agent as the environment takes it."""
        scaled = self._centre + self._reach * action.reshape(self._actions.shape)
        # The clip is for rounding only.
        scaled = np.clip(scaled, self._actions.low, self._actions.high)
        return scaled.astype(self._actions.dtype)


def _check_finite(values: np.ndarray) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        raise ValueError(f"the environment's observation is not finite: {values[~finite][0]}")


def _is_image(box: gym.spaces.Box) -> bool:
    return len(box.shape) == 3 or (len(box.shape) == 2 and min(box.shape) >= _SMALLEST_IMAGE)


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
    if image.ndim == 2:
        image = image[..., None]
    if image.shape[0] <= _CHANNELS < image.shape[-1]:
        image = np.moveaxis(image, 0, -1)
    return np.array(image)  # a copy: an environment may draw the next frame over this one
