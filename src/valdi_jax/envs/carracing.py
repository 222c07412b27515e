"""CarRacing-v3 with separate vision and proprioception (paper, Supp. E).

The bar at the bottom of the frame shows speed, ABS sensors, steering and gyroscope. They are read
into a vector, and the bar is blacked out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import gymnasium as gym
import numpy as np

from valdi_jax.envs.wrappers import ThroughTerminals, paced

if TYPE_CHECKING:
    from valdi_jax.envs.carracing_render import FastCarRacing

_BAR = slice(84, 96)  # rows of the bar
_METERS = slice(84, 94)  # rows of its vertical meters
_NEEDLES = 88  # row that crosses both horizontal meters
_RED, _GREEN, _BLUE = range(3)


def read_proprio(frame: np.ndarray) -> np.ndarray:
    """Speed, four ABS sensors, steering and gyroscope [7] float32 from a raw frame [96, 96, 3]."""
    frame = frame.astype(np.float64) / 255
    speed = frame[_METERS, 12, _RED].sum() / 5
    abs_sensors = frame[_METERS, 18:25:2, _BLUE].sum(axis=0) / 5
    # Each needle extends to the left or right of its centre.
    steering = frame[_NEEDLES, 38:58, _GREEN] / 10
    gyroscope = frame[_NEEDLES, 58:86, _RED] / 5
    steering = steering[10:].sum() - steering[:10].sum()
    gyroscope = gyroscope[14:].sum() - gyroscope[:14].sum()
    return np.array([speed, *abs_sensors, steering, gyroscope], np.float32)


def mask_bar(frame: np.ndarray) -> np.ndarray:
    """The frame with the bar blacked out."""
    frame = frame.copy()
    frame[_BAR] = 0
    return frame


def downsample(frame: np.ndarray, block: int) -> np.ndarray:
    """Frame [height, width, 3] uint8 with blocks of ``block`` x ``block`` pixels averaged."""
    if block == 1:
        return frame
    height, width, channels = frame.shape
    blocks = frame.reshape(height // block, block, width // block, block, channels)
    total = blocks.sum(axis=(1, 3), dtype=np.uint32)
    return ((total + block**2 // 2) // block**2).astype(np.uint8)


class SplitBar(gym.ObservationWrapper):
    """Frame [96, 96, 3] -> dict of ``image``, the frame without its bar, and ``vector`` [7].

    The image is averaged over pixel blocks of side ``block``.

    Attributes:
        skip_frames: while true, frames are not drawn and observations are invalid.
    """

    def __init__(self, env: gym.Env, block: int = 1):
        super().__init__(env)
        self._car_racing = cast("FastCarRacing", env.unwrapped)
        self._block = block
        self.observation_space = gym.spaces.Dict(
            image=gym.spaces.Box(0, 255, (96 // block, 96 // block, 3), np.uint8),
            vector=gym.spaces.Box(-np.inf, np.inf, (7,), np.float32),
        )
        # The planner's tanh output is the action; the car itself clips gas and brake at 0.
        self.action_space = gym.spaces.Box(-1, 1, (3,), np.float32)

    def observation(self, observation):
        image = downsample(mask_bar(observation), self._block)
        return {"image": image, "vector": read_proprio(observation)}

    @property
    def skip_frames(self) -> bool:
        return self._car_racing.skip_frames

    @skip_frames.setter
    def skip_frames(self, skip: bool) -> None:
        self._car_racing.skip_frames = skip

    def redraw(self) -> dict[str, np.ndarray]:
        """The observation of the last step, if its frame was skipped."""
        return self.observation(self._car_racing.frame())


def make_carracing(
    *,
    max_steps: int,
    action_repeat: int = 1,
    downsample: int = 1,
    patience: int = 0,
    through_terminals: bool = False,
    render_mode: str | None = None,
) -> gym.Env:
    """CarRacing-v3, continuous, truncated after ``max_steps`` steps (0: its own limit)."""
    from valdi_jax.envs.carracing_render import FastCarRacing  # only it needs pygame

    limit = max_steps or cast(int, gym.spec("CarRacing-v3").max_episode_steps)
    env: gym.Env = gym.wrappers.TimeLimit(FastCarRacing(render_mode=render_mode), limit)
    if through_terminals:
        env = ThroughTerminals(env)
    env = paced(env, action_repeat=action_repeat, patience=patience)
    return SplitBar(env, downsample)  # outermost: `Stepper` sets its skip_frames
