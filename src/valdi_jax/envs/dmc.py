"""The DeepMind Control Suite (Tunyasuvunakool et al., 2020), by dm_control and Shimmy."""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
from typing import Any

import gymnasium as gym

from valdi_jax.envs.wrappers import paced
from valdi_jax.errors import UsageError

_STEPS = 1000  # of every episode of the suite
_ALIASES = {"cup": "ball_in_cup", "pointmass": "point_mass"}
_VIDEO_SIDE = 480


def make_dmc(
    name: str,
    *,
    max_steps: int = 0,
    action_repeat: int = 1,
    patience: int = 0,
    pixels: int = 0,
    frames: int = 3,
    render_mode: str | None,
) -> gym.Env:
    """Make a task of the suite.

    Args:
        name: domain and task, as in ``cheetah-run`` or ``cartpole-swingup_sparse``.
        max_steps: environment steps after which an episode is truncated; 0 for the suite's 1000.
        action_repeat: environment steps of one decision.
        patience: decisions without reward after which an episode is truncated; 0 for none.
        pixels: side of the images that are observed instead of the states; 0 for states.
        frames: how many images, of successive decisions, make an observation.
        render_mode: ``"rgb_array"`` for videos.

    Raises:
        UsageError: if there is no such task, or the extra ``dmc`` is missing.
    """
    _choose_renderer(draws=bool(pixels or render_mode))
    try:
        from dm_control import suite
        from shimmy.dm_control_compatibility import DmControlCompatibilityV0
    except ModuleNotFoundError as error:
        raise UsageError(
            f"dmc:{name} needs the extra: pip install 'valdi-jax[dmc]' ({error})"
        ) from error
    except Exception as error:  # MuJoCo's renderer raises what it likes
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UsageError(
            f"dm_control cannot be imported: {reason}; MUJOCO_GL is egl or osmesa, or "
            "disabled where nothing is drawn"
        ) from error
    domain, _, task = name.partition("-")
    domain, task = _ALIASES.get(domain, domain).replace("-", "_"), task.replace("-", "_")
    if (domain, task) not in suite.ALL_TASKS:
        known = [f"{domain}-{task}" for domain, task in suite.ALL_TASKS]
        near = difflib.get_close_matches(f"{domain}-{task}", known, n=1)
        hint = f"did you mean dmc:{near[0]}?" if near else f"there are {', '.join(known)}"
        raise UsageError(f"the DeepMind Control Suite has no task {name!r}: {hint}")
    side = pixels or _VIDEO_SIDE
    shown: dict[str, Any] = {"height": side, "width": side, "camera_id": 0}
    env: gym.Env = DmControlCompatibilityV0(
        suite.load(domain, task, task_kwargs={"random": 0}),  # LQR draws its system from it
        render_mode="rgb_array" if pixels else render_mode,
        render_kwargs=shown,
    )
    env.metadata["render_fps"] = round(1 / env.get_wrapper_attr("dt"))
    env = gym.wrappers.TimeLimit(env, max_steps or _STEPS)
    env = paced(env, action_repeat=action_repeat, patience=patience)
    if pixels:  # after the hold: within it hardly anything moves, and velocities could not be seen
        try:
            env = gym.wrappers.AddRenderObservation(env, render_only=True)
        except Exception as error:  # MuJoCo's renderer raises what it likes
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise UsageError(
                f"--env.pixels cannot draw with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}: "
                f"{reason}; egl or osmesa draw without a screen"
            ) from error
        env = gym.wrappers.FrameStackObservation(env, frames)
    return env


def _choose_renderer(*, draws: bool) -> None:
    """Without a screen, MuJoCo needs EGL or OSMesa, named before dm_control is imported.

    Which of them works is tried in a process of its own; workers inherit the answer.
    """
    if "MUJOCO_GL" in os.environ or os.environ.get("DISPLAY") or sys.platform != "linux":
        return
    command = [sys.executable, "-c", "from dm_control import _render"]
    for name in ("egl", "osmesa"):
        tried = subprocess.run(command, env={**os.environ, "MUJOCO_GL": name}, capture_output=True)
        if tried.returncode == 0:
            break
    else:
        name = "disabled"
    os.environ["MUJOCO_GL"] = name
    if draws:
        print(f"no screen: MUJOCO_GL is {name}", file=sys.stderr)
