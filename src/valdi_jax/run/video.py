"""Videos of an agent's first fixed episode."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import RenderCollection

from valdi_jax import cli
from valdi_jax.config import Config, EnvConfig
from valdi_jax.data.rollout import Rollout, roll_out
from valdi_jax.data.source import evaluation_jobs, sized
from valdi_jax.envs import make_env, own_env
from valdi_jax.envs.spaces import Interface
from valdi_jax.envs.workers import LocalPool
from valdi_jax.errors import UsageError
from valdi_jax.run.manifest import check_writable
from valdi_jax.types import Params

_FRAMES_PER_SECOND = 50  # if the environment does not say


def record_video(
    params: Params,
    config: Config,
    path: Path | str,
    *,
    make: Callable[..., gym.Env] = make_env,
    on_decision: Callable[[], None] = lambda: None,
) -> Rollout:
    """Record the first episode of `evaluate`.

    Args:
        params: parameters of all networks.
        config: the run's configuration.
        path: of the video, .gif or .mp4.
        make: called as ``make(config.env, training=False, render_mode="rgb_array")``.
        on_decision: called before every planner call.

    Raises:
        UsageError: if the file cannot be written, the optional dependency is missing, or the
            environment cannot be drawn.
    """
    write = video_writer(Path(path))
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame complains without a screen

    def filmed(config: EnvConfig, *, training: bool) -> gym.Env:
        env = make(config, training=training, render_mode="rgb_array")
        return RenderCollection(env, pop_frames=False, reset_clean=False)

    with contextlib.ExitStack() as stack:
        try:
            env = own_env(filmed, config.env, training=False)
            config = sized(config, Interface(env.observation_space, env.action_space))
            pool = LocalPool(lambda: env)
            stack.callback(pool.close)
            jobs = evaluation_jobs(1)
            (rollout,) = roll_out(
                params,
                pool,
                jobs,
                config=config,
                keep_observations=False,
                on_decision=on_decision,
            )
        except cli.Interrupted:
            raise
        except Exception as error:  # without a screen, MuJoCo raises what it likes
            hint = "MuJoCo without a screen needs MUJOCO_GL=egl or MUJOCO_GL=osmesa"
            if isinstance(error, TypeError):
                hint = "a factory of your own takes render_mode=None, and passes it on"
            raise UsageError(
                f"the environment cannot be drawn ({type(error).__name__}: {error}); {hint}"
            ) from error
        fps = env.metadata.get("render_fps", _FRAMES_PER_SECOND)
        frames = [np.asarray(frame) for frame in cast(list, env.render())]
        write(frames, fps / config.env.action_repeat)  # one frame per hold
        return rollout


def video_writer(path: Path) -> Callable[[list[np.ndarray], float], None]:
    """A function that writes frames to ``path``, which is checked at once."""
    if path.suffix not in (".gif", ".mp4"):
        raise UsageError(f"--video writes .gif or .mp4, not {path.name!r}")
    check_writable(path)
    try:
        import imageio.v3 as imageio
    except ImportError:
        raise UsageError("videos need the extra: pip install 'valdi-jax[video]'") from None

    def write(frames: list[np.ndarray], fps: float) -> None:
        if path.suffix == ".gif":  # 12 frames a second at half the size keep it small
            every = max(1, round(fps / 12.5))
            half = 2 if min(frames[0].shape[:2]) > 200 else 1
            frames = [frame[::half, ::half] for frame in frames[::every]]
            imageio.imwrite(path, frames, duration=1000 * every / fps, loop=0)
        else:
            # The codec only needs even sides; imageio would scale to multiples of 16.
            imageio.imwrite(path, np.stack(frames), fps=fps, plugin="FFMPEG", macro_block_size=2)

    return write
