"""The paper's figures and table beside ours, as one HTML page that needs nothing else.

python experiments/report.py DIR

DIR holds what the scripts left, as `reproduce.py` names it; DIR/report.html is the page, of
`report.html.j2`. What is missing is named there, with the command that makes it. What does not
match the paper comes first.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import decoder
import jax
import jinja2
import numpy as np
import reproduce
import steps_sweep
import value_diagnostics

from valdi_jax import Agent
from valdi_jax.config import leaves, to_dict
from valdi_jax.errors import UsageError
from valdi_jax.evaluate import summary
from valdi_jax.presets import PRESETS
from valdi_jax.run import agents as exported
from valdi_jax.run.log import read_jsonl
from valdi_jax.run.manifest import write_atomic

LIMIT = 14_000_000  # bytes of figures and films in the page
NOISE = 2  # standard errors within which a difference is not one
RELEVANT = 0.05  # share of a score from which a gain counts
FRAMES = 600  # of an episode of CarRacing
MEASURES = ("pixels", "one_minus_ssim", "latents", "lpips")  # of futures
BOTH = ("diffusion", "mlp")
ERRORS = {"td": "TD error", "drift": "drift"}  # along plans
MEDIA = {".png": "image/png", ".gif": "image/gif", ".mp4": "video/mp4"}

Row = dict[str, Any]


class Results(NamedTuple):
    """What a folder holds, and the decoders in the box."""

    where: Path
    steps: list[Row]
    values: list[Row]
    futures: list[Row]
    curves: list[Row]
    decoders: dict[Path, Row]  # records by folder
    times: Row
    headers: dict[str, Row]  # what made a file, by its name
    agents: list[str]  # by the path that scripts were given


class Number(NamedTuple):
    """A mean and its standard error, which a single measurement has none of."""

    mean: float
    error: float | None = None

    def text(self, digits: int) -> str:
        noise = "" if self.error is None else f" ± {self.error:.{digits}f}"
        return plain(self.mean, digits) + noise

    def __abs__(self) -> Number:
        return Number(abs(self.mean), self.error)


class Comparison(NamedTuple):
    """A number of ours beside the paper's, which may be those of several runs."""

    kind: str  # of score, td, drift, lpips, variety
    agent: str
    what: str
    ours: Number
    paper: Sequence[float]

    @property
    def differs(self) -> bool:
        """By more than the noise from the nearer end of the paper's runs."""
        mean, error = self.ours
        distance = max(min(self.paper) - mean, mean - max(self.paper))
        return error is not None and distance > NOISE * error


class Claim(NamedTuple):
    """A statement of the paper, and whether our numbers say so; ``holds`` is none if undecided."""

    kind: str  # of comparisons
    text: str
    holds: bool | None
    ours: str


def read(where: Path) -> Results:
    """Read what a folder holds; what is not there is empty."""
    headers: dict[str, Row] = {}

    def rows(pattern: str) -> list[Row]:
        found: list[Row] = []
        for path in sorted(where.glob(pattern)):
            try:
                headers[path.name] = json.loads(path.read_text())
                found += headers[path.name].pop("rows")
            except (ValueError, LookupError, TypeError) as error:
                raise UsageError(f"{path} is not what the scripts write: {error}") from error
        return found

    def record(path: Path) -> Row:
        return json.loads(path.read_text()) if path.exists() else {}

    steps = steps_sweep.read(where / "steps.json")
    places = {agent: i for i, agent in enumerate(dict.fromkeys(row["agent"] for row in steps))}
    steps.sort(key=lambda row: (places[row["agent"]], row["steps"] or 0, row["futures"]))
    _, futures, curves = (rows(f"{name}.json") for name in ("steps", "futures", "curves"))
    values = sorted(rows("values*.json"), key=lambda row: (row["dynamics"], row["agent"]))
    own = [found] if (found := record(where / "decoder/decoder.json")) else []
    agents = list(dict.fromkeys(row["agent"] for row in [*steps, *values, *futures, *own]))
    folders = {agent: decoder.shipped(agent) for agent in agents or reproduce.BOX}
    folders |= {each["agent"]: where.absolute() / "decoder" for each in own}  # not the shipped one
    there = [reproduce.ROOT / folder for folder in folders.values() if folder]
    decoders = {folder: record(folder / "decoder.json") for folder in there}
    headers |= {f"{folder}/": about for folder, about in decoders.items()}
    times = record(where / reproduce.TIMES)
    return Results(where, steps, values, futures, curves, decoders, times, headers, agents)


def number(cell: Row) -> Number:
    """A mean with its larger error."""
    return Number(cell["mean"], value_diagnostics.larger_error(cell))


def plain(value: float, digits: int) -> str:
    return f"{value:z.{digits}f}".replace("-", "\N{MINUS SIGN}")  # z: no -0.00


def counted(amount: int, what: str) -> str:
    return f"{amount:,} {what}{'' if amount == 1 else 's'}"


def label(agent: str) -> str:
    return Path(agent).name


def machine(header: Row) -> str:
    """Where a file was made."""
    versions = ", ".join(map(" ".join, header["versions"].items()))
    cores = counted(header["cpu"], "core")
    return f"Commit {header['commit']}; {versions}; {cores}, {header['device']}."


def whole(row: Row) -> bool:
    """Whether a score is of whole episodes."""
    return row["max_steps"] in (0, FRAMES)


def paper_steps(dynamics: str, steps: int | None) -> tuple[str, str]:
    """The paper's scores and LPIPS."""
    return steps_sweep.PAPER.get((dynamics, steps), ("", ""))


def paper_values(kind: str) -> dict[str, Sequence[float]]:
    """Rows of the paper's table by dynamics."""
    return dict(zip(BOTH, value_diagnostics.PAPER[kind].values(), strict=True))


def distances(futures: Sequence[Row]) -> dict[int, dict[str, Number]]:
    """Mean distances of futures over states, by the number of steps and the measure."""
    found: dict[int, dict[str, Number]] = {}
    for steps in sorted({row["steps"] for row in futures}):
        own = [row for row in futures if row["steps"] == steps]
        known = {m: [row[m] for row in own if row.get(m) is not None] for m in MEASURES}
        found[steps] = {m: number(summary(numbers)) for m, numbers in known.items() if numbers}
    return found


def comparisons(results: Results) -> Iterator[Comparison]:
    """Every number of ours that the paper has."""
    for row in results.steps:
        score, _ = paper_steps(row["dynamics"], row["steps"])
        if score and whole(row) and row["futures"] == 1:
            what = counted(row["steps"], "step") if row["steps"] else "score"
            theirs = [float(run) for run in score.split(",")]
            yield Comparison("score", label(row["agent"]), what, number(row), theirs)
    for row, kind in itertools.product(results.values, ERRORS):
        paper = paper_values(kind).get(row["dynamics"], ())
        for cell, each in zip(row[kind], paper, strict=False):
            yield Comparison(kind, label(row["agent"]), f"h = {cell['h']}", number(cell), [each])
    for steps, means in distances(results.futures).items():
        _, lpips = paper_steps("diffusion", steps)
        if lpips and "lpips" in means:
            agent, what = label(results.futures[0]["agent"]), counted(steps, "step")
            yield Comparison("lpips", agent, what, means["lpips"], [float(lpips)])


def costs(results: Results) -> Iterator[str]:
    """What more steps and futures do to each agent's score, track by track."""
    for row in results.steps:
        numbers = steps_sweep.difference(row, results.steps)
        if numbers is not None:
            found = number(numbers)
            verdict = {
                1: "scores higher",
                -1: "scores lower",
                0: "is no different",
                None: "is open",
            }
            said = verdict[order(found, Number(0, 0))]
            yield f"{label(row['agent'])} with {way(row)} {said} ({found.text(0)})"


def way(row: Row) -> str:
    """How a row's candidates are imagined."""
    if not row["steps"]:
        return ""
    more = f" with {row['futures']} futures" if row["futures"] > 1 else ""
    return counted(row["steps"], "step") + more


def order(a: Number, b: Number) -> int | None:
    """1 if a is above b, -1 if below, 0 within the noise; none if the noise is not known."""
    if a.error is None or b.error is None:
        return None
    difference = a.mean - b.mean
    noise = NOISE * math.hypot(a.error, b.error)
    return 0 if abs(difference) <= noise else int(math.copysign(1, difference))


def paired(a: Row, b: Row) -> Number:
    """How much higher the score of one row is than another's, track by track."""
    pairs = zip(a["returns"], b["returns"], strict=False)  # of tracks that both have
    return number(summary([x - y for x, y in pairs]))


def bounded(gain: Number, most: float, *, both: bool = False) -> bool | None:
    """Whether there is no gain (with ``both``, no difference).

    False if there surely is one, true if the noise hides none of ``most``; else none.
    """
    if gain.error is None:
        return None
    low, high = gain.mean - NOISE * gain.error, gain.mean + NOISE * gain.error
    if low > 0 or (both and high < 0):
        return False
    return True if high < most and (low > -most or not both) else None


def above(a: Number, b: Number) -> bool | None:
    """Whether a > b; none if it cannot be told."""
    return {1: True, -1: False}.get(order(a, b))


def every(verdicts: Sequence[bool | None]) -> bool | None:
    return False if False in verdicts else None if None in verdicts else True


def claims(results: Results) -> Iterator[Claim]:
    """What the paper says of its numbers, where ours can say it, too."""
    # Of several agents with the same dynamics, the first.
    alone = [row for row in results.steps if row["futures"] == 1]
    rows = {(r["dynamics"], r["steps"]): r for r in reversed(alone) if whole(r)}
    one, mlp = rows.get(("diffusion", 1)), rows.get(("mlp", None))
    if one and mlp:
        text = "At one diffusion step, the score is the MLP's."
        gain = paired(one, mlp)
        same = bounded(gain, RELEVANT * abs(mlp["mean"]), both=True)
        ours = f"{number(one).text(0)} and {number(mlp).text(0)}, track by track {gain.text(0)}"
        yield Claim("score", text, same, ours)
    more = [r for (name, steps), r in rows.items() if name == "diffusion" and steps > 1]
    if one and more:
        text = "More diffusion steps do not raise the score."
        best = max(more, key=lambda row: row["mean"])
        gain = paired(best, one)
        ours = f"{number(one).text(0)} at 1, at best {number(best).text(0)} at {best['steps']}"
        ours += f", track by track {gain.text(0)}"
        yield Claim("score", text, bounded(gain, RELEVANT * abs(one["mean"])), ours)
    drawn = [r for r in alone if r["dynamics"] == "diffusion" and r["rollouts"]]
    drawn = [row for row in drawn if row["agent"] == drawn[0]["agent"]]
    variety = sorted((row["steps"], row["variety"]) for row in drawn)
    if len(variety) > 1:
        text = "More diffusion steps imagine more variety."
        grows = all(a < b for (_, a), (_, b) in itertools.pairwise(variety))
        ours = ", ".join(f"{mean:.2f} at {steps}" for steps, mean in variety)
        yield Claim("variety", text, grows, ours)
    values = {
        row["dynamics"]: {kind: [number(cell) for cell in row[kind]] for kind in ERRORS}
        for row in reversed(results.values)
    }
    if diffusion := values.get("diffusion"):
        text = "The diffusion model's TD error is largest at the start of the plan."
        first, *_, last = td = diffusion["td"]
        ours = f"{plain(first.mean, 2)} at h = 0; {plain(last.mean, 2)} at h = {len(td) - 1}"
        yield Claim("td", text, above(abs(first), abs(last)), ours)
    for dynamics, own in sorted(values.items()):
        drift = own["drift"]
        ours = ", ".join(plain(each.mean, 2) for each in drift)
        text = f"Drift is negative: plans are optimistic ({dynamics})."
        yield Claim("drift", text, every([above(Number(0, 0), each) for each in drift]), ours)
        text = f"Drift grows along the plan ({dynamics})."
        yield Claim("drift", text, above(abs(drift[-1]), abs(drift[0])), ours)
    if values.keys() >= set(BOTH):
        for place, at, near, far in (
            ("start", 0, "mlp", "diffusion"),
            ("end", -1, "diffusion", "mlp"),
        ):
            pairs = {kind: (values[near][kind][at], values[far][kind][at]) for kind in ERRORS}
            text = f"At the {place} of the plan, the {near} model's errors are the smaller ones."
            smaller = every([above(abs(b), abs(a)) for a, b in pairs.values()])
            ours = "; ".join(
                f"{ERRORS[kind]} {near} {plain(a.mean, 2)}, {far} {plain(b.mean, 2)}"
                for kind, (a, b) in pairs.items()
            )
            yield Claim("td", text, smaller, ours)


def about(name: str) -> Row | None:
    """An agent's size, training and settings other than the paper's; none if it is gone."""
    try:
        agent = Agent.load(name)
    except UsageError:
        return None
    trained: Row = {}
    if packaged := exported.locate(Path(name)):
        *_, trained = exported.load(packaged)
    elif records := [r for r in read_jsonl(Path(name) / "metrics.jsonl") if "episode" in r]:
        last = records[-1]
        trained = {"episodes": last["episode"] + 1, "environment_steps": last["total/env_steps"]}
        trained["hours"] = last["time/seconds"] / 3600
    paper, own = (dict(leaves(to_dict(c))) for c in (PRESETS["paper"], agent.config))
    learning = ("model", "planner", "learn", "collect", "replay", "env")
    shared = [key for key in own if key in paper and key.partition(".")[0] in learning]
    return (
        dict.fromkeys(("episodes", "environment_steps", "hours", "command"))
        | trained
        | {
            "dynamics": agent.config.model.dynamics,
            "parameters": sum(np.size(leaf) for leaf in jax.tree.leaves(agent.params)),
            "changes": [(key, paper[key], own[key]) for key in shared if paper[key] != own[key]],
        }
    )


def embed(paths: Iterable[Path], limit: int) -> dict[Path, tuple[str | None, tuple[int, int]]]:
    """Existing files, and sizes of pictures; none in place of what the page cannot hold."""
    media = {}
    for path in filter(Path.exists, paths):
        data = path.read_bytes()
        uri = f"data:{MEDIA[path.suffix]};base64,{base64.b64encode(data).decode()}"
        fits = len(uri) <= limit
        limit -= len(uri) if fits else 0
        size = struct.unpack_from(">II", data, 16) if path.suffix == ".png" else (0, 0)
        media[path] = uri if fits else None, size
    return media


def missing(results: Results) -> list[tuple[str, str]]:
    """Stages, and what of them is not there."""
    names = {
        path.name for folder in (results.where, *results.decoders) for path in folder.iterdir()
    }
    values = {row["dynamics"] for row in results.values}
    wanted = [
        ("steps", "scores with more diffusion steps", results.steps),
        ("steps", "the figure steps.png", "steps.png" in names or not results.steps),
        ("curves", "curves of training", "curves.png" in names),
        ("values", "values along plans", values),
        *[
            ("values", f"values along plans of the {dynamics} model", dynamics in (values or BOTH))
            for dynamics in BOTH
        ],
        ("plans", "films of plans", any(name.startswith("plans") for name in names)),
        ("futures", "decoded futures", "futures.png" in names),
        ("decoder", "a decoder", "samples.png" in names),
    ]
    return [(stage, what) for stage, what, there in wanted if not there]


def commands(results: Results, agents: Sequence[str]) -> dict[str, str]:
    """Commands by kind of stage: as it ran, else as it would for these agents."""
    named = [reproduce.describe(agent) for agent in agents or reproduce.BOX]
    planned = {s.name: s.command for s in reproduce.stages(results.where, named, reproduce.Sizes())}
    ran = {name: stage["command"] for name, stage in results.times.get("stages", {}).items()}
    both = reversed((planned | ran).items())  # the first of those of a kind stays
    return {name.partition("-")[0]: command for name, command in both}


def render(results: Results, limit: int = LIMIT) -> str:
    """The page."""
    where, headers = results.where, results.headers
    stages = results.times.get("stages", {})
    films = [path for path in where.glob("plans*") if path.suffix in MEDIA]
    films.sort(key=lambda path: path.stem)
    shown = [where / "steps.png", where / "curves.png", *films, where / "futures.png"]
    shown += [folder / "samples.png" for folder in results.decoders]
    known = {agent: about(agent) for agent in results.agents}
    means = distances(results.futures)
    took = {stage["command"]: stage["seconds"] for stage in stages.values() if stage["done"]}

    def made(start: str) -> list[tuple[str, float | None]]:
        """Commands behind files whose names start so, and their seconds where a stage ran them."""
        own, ran = (
            [about["command"] for name, about in each.items() if name.startswith(start)]
            for each in (headers, stages)
        )
        return [(command, took.get(command)) for command in own or ran]

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(reproduce.HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (counted, label, machine, made, number, plain, way, whole)
    environment.filters |= {each.__name__: each for each in filters} | {"time": reproduce.length}
    return environment.get_template("report.html.j2").render(
        results._asdict(),
        noise=NOISE,
        found=list(comparisons(results)),
        said=list(claims(results)),
        known=known,
        distances=means,
        measures=[name for name in MEASURES if any(name in each for each in means.values())],
        paper_steps=paper_steps,
        against=steps_sweep.against,
        costs=list(costs(results)),
        paper_values=paper_values,
        films=films,
        media=embed(shown, limit),
        missing=missing(results),
        commands=commands(results, [agent for agent in known if known[agent]]),
        stages={name: stage for name, stage in stages.items() if name != "report"},
        trial=any("--quick" in header.get("command", "") for header in headers.values()),
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args(argv).folder
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder")
    results = read(folder)
    out = folder / reproduce.REPORT
    write_atomic(out, render(results).encode())
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    if absent := missing(results):
        print(f"missing: {'; '.join(what for _, what in absent)}")
    return 0


if __name__ == "__main__":
    from valdi_jax import cli

    cli.run(main)
