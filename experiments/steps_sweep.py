"""Return and variety of imagined futures against diffusion steps (the paper's Figure 3).

python experiments/steps_sweep.py carracing carracing-mlp --steps 1 2 4 8 8x2 --json steps.json

8x2 stands for 8 steps and two futures of each candidate, whose mean return is its score.

Variety is the distance of two imagined last latents, as the root of their mean squared difference:
the mean over all pairs of 100 rollouts of one state and plan that differ in their noise, averaged
over 8 states of the first episode. These and their plans are the agent's own, so the same for every
number of steps. The paper compares decoded images (LPIPS) instead, on another scale.

"Against" is the mean difference from the fewest steps of the same agent, episode by episode, with
its standard error. Interrupt it, and the same command goes on: the JSON keeps all returns, so that
more episodes or steps add to it. Its header is that of the last command that computed something.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evidence
import jax
import jax.numpy as jnp
import numpy as np

from valdi_jax import Agent, cli, model
from valdi_jax.config import Config, validate
from valdi_jax.dynamics import DYNAMICS
from valdi_jax.envs import evaluation_seeds
from valdi_jax.errors import UsageError
from valdi_jax.evaluate import evaluate, summary
from valdi_jax.types import Array, Params

# Read off the paper's plot, by dynamics and steps: returns of its two runs, LPIPS.
PAPER = {
    ("diffusion", 1): ("799, 783", "0.006"),
    ("diffusion", 2): ("789, 789", "0.025"),
    ("diffusion", 4): ("782, 779", "0.033"),
    ("diffusion", 8): ("771, 775", "0.040"),
    ("mlp", None): ("750, 777", ""),
}

Row = dict[str, Any]
# What two rows of the same agent, the same environment and the same question have in common.
SETTINGS = ("agent", "digest", "steps", "futures", "max_steps", "pairs", "rollouts")


def spread(latents: Array) -> Array:
    """Mean distance [] of all pairs of latents [N, D]."""
    count = latents.shape[0]
    apart = latents[:, None] - latents[None]
    return jnp.sqrt(jnp.mean(apart**2, axis=-1)).sum() / (count * (count - 1))


@functools.partial(jax.jit, static_argnames=("config", "rollouts"))
def imagine(
    params: Params, z: Array, chunks: Array, key: Array, *, config: Config, rollouts: int
) -> Array:
    """Latents [P, N, H, D] that follow states z [P, D] under plans [P, H, C * A], N times each."""

    def of_pair(z: Array, chunks: Array, key: Array) -> Array:
        noise = jax.random.normal(key, (rollouts, config.model.horizon, config.model.latent_dim))
        one = functools.partial(
            model.imagine, config=config.model, steps=config.planner.diffusion_steps
        )
        return jax.vmap(one, (None, None, None, 0))(params["dynamics"], z, chunks, noise)

    return jax.vmap(of_pair)(z, chunks, jax.random.split(key, z.shape[0]))


def generative(agent: Agent) -> bool:
    """Whether what it imagines depends on noise and steps."""
    return DYNAMICS[agent.config.model.dynamics].step is None


def read(path: Path) -> list[Row]:
    """Rows of a sweep before; none if there is no such file.

    Raises:
        UsageError: if the file is not what this script writes.
    """
    try:
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        return [row for row in rows if row["returns"] and row["plan_times"] and row["digest"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{path} is not what the scripts write: {error!r}") from error


def merged(rows: list[Row]) -> list[Row]:
    """Of rows with the same settings, the one with the most episodes."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple(row[name] for name in SETTINGS)
        if key not in found or len(row["returns"]) > len(found[key]["returns"]):
            found[key] = row
    return list(found.values())


def way(text: str) -> tuple[int, int]:
    """Steps and futures of an argument: 8, or 8x2."""
    try:
        steps, *futures = map(int, text.split("x"))
        return steps, *(futures or [1])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not N or NxM, such as 8x2") from None


def with_steps(agent: Agent, steps: int | None, futures: int) -> Config:
    """An agent's configuration with a number of diffusion steps, or none, and of futures."""
    if steps is None:
        return agent.config
    return agent.config.replace(planner={"diffusion_steps": steps, "futures": futures})


def variety(agent: Agent, steps: int, states: evidence.States, rollouts: int) -> float:
    """Mean distance of imagined last latents that differ in their noise."""
    config = with_steps(agent, steps, 1).graph
    latents = imagine(
        *(agent.params, states.z, states.chunks, jax.random.key(0)),
        config=config,
        rollouts=rollouts,
    )
    return float(jnp.mean(jax.vmap(spread)(latents[:, :, -1])))


def score(agent: Agent, steps: int | None, futures: int, episode: int) -> tuple[float, float]:
    """Return of one of the fixed episodes, and the median time of a plan in milliseconds."""
    config = with_steps(agent, steps, futures)
    (driven,) = evaluate(agent.params, config, episodes=episode + 1, first=episode)
    return driven.episode.episode_return, 1000 * float(np.median(driven.plan_seconds))


def summarise(row: Row, episodes: int) -> Row:
    """A row as shown: of the first episodes only."""
    returns, times = row["returns"][:episodes], row["plan_times"][:episodes]
    numbers = summary(returns)
    return row | {
        "episodes": len(returns),
        "mean": numbers["mean"],
        "standard_error": numbers["standard_error"],
        "plan_ms": float(np.median(times)),
        "returns": returns,
        "plan_times": times,
    }


def difference(row: Row, rows: list[Row]) -> dict[str, Any] | None:
    """Mean difference from the same agent's row with the fewest steps, episode by episode."""
    alike = "agent", "digest", "max_steps"
    own = [r for r in rows if r["steps"] and all(r[name] == row[name] for name in alike)]
    base = min(own, key=lambda other: (other["steps"], other["futures"]), default=row)
    if base is row or not row["steps"]:
        return None
    pairs = zip(row["returns"], base["returns"], strict=False)  # of episodes that both have
    return summary([ours - theirs for ours, theirs in pairs])


def against(row: Row, rows: list[Row]) -> str:
    """`difference` as text."""
    numbers = difference(row, rows)
    if numbers is None:
        return ""
    return evidence.plus_minus(numbers["mean"], numbers["standard_error"], 0)


def table(rows: list[Row]) -> str:
    """Markdown: a row an agent and number of steps, the paper's numbers on CarRacing beside."""
    titles = ["agent", "steps", "futures", "return", "against", "plan ms", "variety"]
    titles += ["paper, CarRacing: return", "LPIPS"]
    lines = []
    for r in rows:
        steps = "" if r["steps"] is None else str(r["steps"])
        score = evidence.plus_minus(r["mean"], r["standard_error"], 0)
        paper = PAPER.get((r["dynamics"], r["steps"]), ("", "")) if r["futures"] == 1 else ("", "")
        measured = f"{r['plan_ms']:.1f}", f"{r['variety']:.4f}"
        futures = "" if r["steps"] is None else str(r["futures"])
        known = [Path(r["agent"]).name, steps, futures, score, against(r, rows)]
        lines.append([*known, *measured, *paper])
    return evidence.markdown(titles, lines)


def draw(rows: list[Row], out: Path) -> None:
    """Return and variety over steps, side by side; agents without steps are levels."""
    import matplotlib.pyplot as plt  # an optional package

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    groups = dict.fromkeys((row["agent"], row["futures"]) for row in rows)
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(name for name, _ in groups))}
    for name, futures in groups:
        own = sorted(
            (row for row in rows if (row["agent"], row["futures"]) == (name, futures)),
            key=lambda row: row["steps"] or 0,
        )
        label = Path(name).name + (f", {futures} futures" if futures > 1 else "")
        color, marker = colors[name], "o" if futures == 1 else "s"
        if own[0]["steps"] is None:
            left.axhline(own[0]["mean"], color=color, linestyle="--", label=label)
            right.axhline(own[0]["variety"], color=color, linestyle="--")
            continue
        steps = [row["steps"] for row in own]
        errors = [row["standard_error"] or 0.0 for row in own]
        returns = [row["mean"] for row in own]
        left.errorbar(steps, returns, errors, color=color, marker=marker, capsize=3, label=label)
        if futures == 1:
            right.plot(steps, [row["variety"] for row in own], color=color, marker="o")
    ticks = sorted({row["steps"] for row in rows if row["steps"] is not None})
    for panel, label in ((left, "return"), (right, "variety of imagined last latents")):
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
        if ticks:
            panel.set_xscale("log", base=2)
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.minorticks_off()
        panel.set_xlabel("diffusion steps")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("agents", nargs="+", metavar="AGENT")
    parser.add_argument("--steps", type=way, nargs="+", metavar="N[xM]", help="by default 1 2 4 8")
    parser.add_argument("--episodes", type=int, default=100, help="the first of the fixed ones")
    parser.add_argument("--json", type=Path, help="where results are kept")
    parser.add_argument(
        "--known", type=Path, nargs="+", default=[], metavar="JSON", help="results of other sweeps"
    )
    parser.add_argument("--figure", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="a trial: short episodes, and by default 1 and 2 steps"
    )
    arguments = evidence.parse(parser, argv, {"episodes": 2})
    steps_by_default = (1, 2, 4, 8)
    pairs, rollouts = 8, 100
    if arguments.quick:
        steps_by_default = (1, 2)
        pairs, rollouts = 2, 20
    ways = sorted(set(arguments.steps or [(steps, 1) for steps in steps_by_default]))
    evaluation_seeds(arguments.episodes)  # raises
    agents = {name: evidence.load(name, "dynamics") for name in arguments.agents}
    for agent in agents.values():
        if arguments.quick:
            agent.config = agent.config.replace(env={"max_steps": 60})
        for steps, futures in ways if generative(agent) else []:
            validate(with_steps(agent, steps, futures))
    own = [arguments.json] if arguments.json else []
    rows = merged([row for path in (*own, *arguments.known) for row in read(path)])
    shown = []
    for name, agent in agents.items():
        states = functools.cache(functools.partial(evidence.states, agent, pairs))
        digest = evidence.identity(agent)
        for steps, futures in ways if generative(agent) else [(None, 1)]:
            settings = {
                "agent": name,
                "digest": digest,
                "dynamics": agent.config.model.dynamics,
                "steps": steps,
                "futures": futures,
                "max_steps": agent.config.env.max_steps,  # 0 for the environment's own limit
                "pairs": pairs if steps else 0,
                "rollouts": rollouts if steps else 0,
            }
            row = next((row for row in rows if settings.items() <= row.items()), None)
            if row is None:
                known = variety(agent, steps, states(), rollouts) if steps else 0.0
                row = settings | {"variety": known, "returns": [], "plan_times": []}
                rows.append(row)
            for episode in range(len(row["returns"]), arguments.episodes):
                found, time = score(agent, steps, futures, episode)
                row["returns"].append(found)
                row["plan_times"].append(time)
                row |= summarise(row, episode + 1)
                if arguments.json:
                    evidence.write(arguments.json, rows, [__file__, *argv])
            shown.append(summarise(row, arguments.episodes))
    if arguments.json and read(arguments.json) != rows:  # some are known from elsewhere
        evidence.write(arguments.json, rows, [__file__, *argv])
    print(table(shown))
    if arguments.figure and importlib.util.find_spec("matplotlib"):
        draw(shown, arguments.figure)
    elif arguments.figure:
        print("no figure: matplotlib is not installed", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
