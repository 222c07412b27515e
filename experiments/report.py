"""The paper's figures and table beside ours, as one HTML page that needs nothing else.

python experiments/report.py DIR

DIR holds what the scripts left, as `reproduce.py` names it; DIR/report.html is the page. What is
missing is named there, with the command that makes it. What does not match the paper comes first.
"""

from __future__ import annotations

import argparse
import base64
import functools
import html
import itertools
import json
import math
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
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
PAPER_LENGTH = {"episodes": 5000, "steps": 3_000_000, "parameters": {"diffusion": 5.4, "mlp": 5.8}}
PAPER_TRACKS, PAPER_STATES = 100, 10_000
FRAMES = 600  # of an episode of CarRacing

# HTML. Why numbers or statements differ, as far as it is known. Shown only where one does.
REASONS = {
    "score": "The paper's runs are of 5,000 episodes, ours far shorter, and of smaller networks "
    "(see Run lengths). The error is over tracks: another run of the same settings differs by "
    "more.",
    "td": "Which of the differences from the paper's settings is the cause has not been tested. "
    "Candidates: smaller networks, fewer episodes, value targets of TD(&lambda;) rather than of "
    "one step, and agents that act with an average of their parameters (Run lengths lists them).",
    "drift": "Not tested by itself either. Drift is relative to how an agent drives, and to what "
    "its value heads have learned: the candidates are those of the TD error.",
    "lpips": "The decoder learns from far fewer frames than the paper's, and these can be smaller; "
    "what it blurs cannot differ. Smaller networks, trained for less time, may also spread less.",
    "variety": "Variety here is of latents rather than of decoded images.",
}

KINDS = {
    "score": "Scores",
    "td": "TD errors along plans",
    "drift": "Drift of values along plans",
    "lpips": "LPIPS of imagined futures",
    "variety": "Variety of imagined latents",
}

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; }
h1 { line-height: 1.2; } h2 { margin: 2.5rem 0 .5rem; line-height: 1.25; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th, td { vertical-align: top; }
th:first-child, td:first-child, .words td, .words th { text-align: left; }
td small { display: block; opacity: .75; white-space: nowrap; }
tr.paper { background: var(--soft); font-style: italic; }
figure { margin: 1rem 0; overflow-x: auto; }
figure img { display: block; background: white; border-radius: 4px; width: 100%; height: auto; }
video, .film { display: block; width: min(100%, 24rem); border-radius: 4px; }
.films { display: flex; flex-wrap: wrap; gap: 1rem; } .films figure { flex: 0 1 24rem; }
figcaption { font-size: .9rem; }
blockquote { margin: 1rem 0; padding: .1rem 1rem; border-left: 4px solid var(--line); }
code { font-size: .85em; overflow-wrap: anywhere; }
.missing, .trial { border: 2px solid #c60; border-radius: 4px; padding: .5rem 1rem; }
.made { font-size: .9rem; opacity: .85; }
li { margin: .5rem 0; }
@media (max-width: 480px) { th, td { padding: .3rem .35rem; font-size: .85rem; } }
"""

# The page cannot load anything, nor run a script.
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"

Row = dict[str, Any]


class Results(NamedTuple):
    """What a folder holds."""

    where: Path
    steps: list[Row]
    values: list[Row]
    futures: list[Row]
    curves: list[Row]
    decoder: Row
    times: Row
    headers: dict[str, Row]  # what made a file, by its name

    @property
    def agents(self) -> list[str]:
        """Agents by the path that scripts were given, in the order of the first that names them."""
        named = [row["agent"] for row in [*self.steps, *self.values, *self.futures]]
        named += [self.decoder["agent"]] if self.decoder else []
        return list(dict.fromkeys(named))

    @property
    def trial(self) -> bool:
        return any("--quick" in header.get("command", "") for header in self.headers.values())


class Comparison(NamedTuple):
    """A number of ours beside the paper's, which may be those of several runs."""

    kind: str  # of REASONS
    agent: str
    what: str
    ours: float
    error: float | None  # standard error; none of a single one
    paper: tuple[float, ...]
    digits: int = 2

    @property
    def distance(self) -> float:
        """From the nearer end of the paper's runs; 0 between them."""
        return self.ours - min(max(self.ours, min(self.paper)), max(self.paper))

    @property
    def differs(self) -> bool:
        return self.error is not None and abs(self.distance) > NOISE * self.error


class Claim(NamedTuple):
    """A statement of the paper, and whether our numbers say so; ``holds`` is none if undecided."""

    kind: str  # of REASONS
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
                data = json.loads(path.read_text())
                found += data["rows"]
            except (ValueError, LookupError, TypeError) as error:
                raise UsageError(f"{path} is not what the scripts write: {error}") from error
            headers[path.name] = {name: value for name, value in data.items() if name != "rows"}
        return found

    def record(name: str) -> Row:
        path = where / name
        return json.loads(path.read_text()) if path.exists() else {}

    decoder = record("decoder/decoder.json")
    if decoder:
        headers["decoder"] = decoder
    return Results(
        where,
        rows("steps.json"),
        sorted(rows("values*.json"), key=lambda row: (row["dynamics"], row["agent"])),
        rows("futures.json"),
        rows("curves.json"),
        decoder,
        record(reproduce.TIMES),
        headers,
    )


# --- what the numbers say


def runs(text: str) -> tuple[float, ...]:
    """The paper's numbers, as the scripts hold them."""
    return tuple(float(part) for part in text.split(",") if part.strip())


def whole(row: Row) -> bool:
    """Whether a score is of whole episodes."""
    return row["max_steps"] in (0, FRAMES)


def label(row: Row) -> str:
    return Path(row["agent"]).name


def error_of(cell: Row) -> float | None:
    """The larger of the errors over states and over episodes, whose states hang together."""
    known = [cell[name] for name in ("standard_error", "episode_error") if cell[name] is not None]
    return max(known) if known else None


def comparisons(results: Results) -> Iterator[Comparison]:
    """Every number of ours that the paper has."""
    for row in results.steps:
        score, _ = steps_sweep.PAPER.get((row["dynamics"], row["steps"]), ("", ""))
        if score and whole(row):
            what = count(row["steps"], "step") if row["steps"] else "score"
            ours = row["mean"], row["standard_error"]
            yield Comparison("score", label(row), what, *ours, runs(score), 0)
    for row in results.values:
        for kind in ("td", "drift"):
            paper = paper_values(kind).get(row["dynamics"], ())
            for cell, number in zip(row[kind], paper, strict=False):
                ours = cell["mean"], error_of(cell)
                yield Comparison(kind, label(row), f"h = {cell['h']}", *ours, (number,))
    for steps, own in by_steps(results.futures).items():
        _, lpips = steps_sweep.PAPER.get(("diffusion", steps), ("", ""))
        measured = [row["lpips"] for row in own if row.get("lpips") is not None]
        if lpips and measured:
            numbers = summary(measured)
            ours = numbers["mean"], numbers["standard_error"]
            what = count(steps, "step")
            yield Comparison("lpips", label(own[0]), what, *ours, runs(lpips), 3)


def paper_values(kind: str) -> dict[str, Sequence[float]]:
    """Rows of the paper's table by dynamics."""
    names = {"Valdi": "diffusion", "MLP": "mlp"}
    table = value_diagnostics.PAPER[kind].items()
    return {names[name.rpartition(" ")[2]]: numbers for name, numbers in table}


def by_steps(rows: Sequence[Row]) -> dict[int, list[Row]]:
    steps = sorted({row["steps"] for row in rows})
    return {number: [row for row in rows if row["steps"] == number] for number in steps}


def larger(a: float, b: float, *errors: float | None) -> bool | None:
    """Whether a > b; none if the difference is within the noise, or the noise is not known."""
    if any(error is None for error in errors):
        return None
    noise = NOISE * math.hypot(*errors)
    return None if abs(a - b) <= noise else a > b


def every(verdicts: Sequence[bool | None]) -> bool | None:
    if any(verdict is False for verdict in verdicts):
        return False
    return None if None in verdicts else True


def claims(results: Results) -> Iterator[Claim]:
    """What the paper says of its numbers, where ours can say it, too."""
    rows = [row for row in reversed(results.steps) if whole(row)]  # the first of each stays
    scores = {(row["dynamics"], row["steps"]): row for row in rows}
    steps = sorted(n for dynamics, n in scores if dynamics == "diffusion")
    one, mlp = scores.get(("diffusion", 1)), scores.get(("mlp", None))
    if one and mlp:
        apart = larger(*[row["mean"] for row in (one, mlp)], *errors_of(one, mlp))
        known = None not in errors_of(one, mlp)
        yield Claim(
            "score",
            "At one diffusion step, the score is the MLP's within the noise.",
            apart is None if known else None,
            f"{measured(one)} and {measured(mlp)}",
        )
    more = [scores["diffusion", n] for n in steps if n > 1]
    if one and more:
        best = max(more, key=lambda row: row["mean"])
        better = larger(best["mean"], one["mean"], *errors_of(best, one))
        known = None not in errors_of(best, one)
        yield Claim(
            "score",
            "More diffusion steps do not raise the score.",
            better is not True if known else None,
            f"{measured(one)} at 1, at best {measured(best)} at {best['steps']}",
        )
    varied = [row for row in results.steps if row["dynamics"] == "diffusion" and row["rollouts"]]
    varied.sort(key=lambda row: row["steps"])
    if len(varied) > 1:
        numbers = [row["variety"] for row in varied]
        yield Claim(
            "variety",
            "More diffusion steps imagine more variety.",
            all(a < b for a, b in itertools.pairwise(numbers)),
            ", ".join(f"{row['variety']:.2f} at {row['steps']}" for row in varied),
        )
    values = {row["dynamics"]: row for row in reversed(results.values)}  # the first of each
    if diffusion := values.get("diffusion"):
        first, last = diffusion["td"][0], diffusion["td"][-1]
        yield Claim(
            "td",
            "The diffusion model's TD error is largest at the start of the plan.",
            larger(abs(first["mean"]), abs(last["mean"]), *map(error_of, (first, last))),
            "; ".join(f"{plain(c)} at h = {c['h']}" for c in (first, last)),
        )
    for dynamics, row in sorted(values.items()):
        first, last = row["drift"][0], row["drift"][-1]
        negative = [larger(0.0, cell["mean"], error_of(cell)) for cell in row["drift"]]
        text = ", ".join(map(plain, row["drift"]))
        optimistic = f"Drift is negative: plans are optimistic ({dynamics})."
        yield Claim("drift", optimistic, every(negative), text)
        yield Claim(
            "drift",
            f"Drift grows along the plan ({dynamics}).",
            larger(abs(last["mean"]), abs(first["mean"]), *map(error_of, (first, last))),
            text,
        )
    if {"diffusion", "mlp"} <= values.keys():
        for where, at, nearer, further in (
            ("start", 0, "mlp", "diffusion"),
            ("end", -1, "diffusion", "mlp"),
        ):
            pairs = [(values[further][k][at], values[nearer][k][at]) for k in ("td", "drift")]
            yield Claim(
                "td",
                f"At the {where} of the plan, the {nearer} model's errors are the smaller ones.",
                every([larger(*map(size, pair), *map(error_of, pair)) for pair in pairs]),
                "; ".join(
                    f"{title} {nearer} {plain(b)}, {further} {plain(a)}"
                    for title, (a, b) in zip(("TD error", "drift"), pairs, strict=True)
                ),
            )


def size(cell: Row) -> float:
    return abs(cell["mean"])


def errors_of(*rows: Row) -> list[float | None]:
    return [row["standard_error"] for row in rows]


def plain(cell: Row) -> str:
    return plus_minus(cell["mean"], None, 2)


def measured(row: Row) -> str:
    return plus_minus(row["mean"], row["standard_error"], 0)


def plus_minus(mean: float, error: float | None, digits: int) -> str:
    number = minus(f"{round(mean, digits) + 0.0:.{digits}f}")  # no -0.00
    return number if error is None else f"{number} ± {error:.{digits}f}"


def minus(numbers: str) -> str:
    return numbers.replace("-", "\N{MINUS SIGN}")


def count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


# --- the agents


class About(NamedTuple):
    """What is known of an agent."""

    dynamics: str
    parameters: int
    episodes: int | None
    steps: int | None
    hours: float | None
    command: str
    changes: dict[str, tuple[Any, Any]]  # from the paper's settings: theirs, its own


@functools.cache
def about(name: str) -> About | None:
    """An agent's size, training and settings; none if it is gone."""
    try:
        agent = Agent.load(name)
    except UsageError:
        return None
    config = agent.config
    packaged = exported.locate(Path(name))
    if packaged is not None:
        _, _, trained = exported.load(packaged)
        length = [trained.get(key) for key in ("episodes", "environment_steps", "hours")]
        command = trained.get("command", "")
    else:
        records = [r for r in read_jsonl(Path(name) / "metrics.jsonl") if "episode" in r]
        last = records[-1] if records else {}
        length = [last["episode"] + 1, last["total/env_steps"]] if last else [None, None]
        length.append(last["time/seconds"] / 3600 if last else None)
        command = ""
    paper = dict(leaves(to_dict(PRESETS["paper"])))
    own = dict(leaves(to_dict(config)))
    learning = ("model", "planner", "learn", "collect", "replay", "env")
    return About(
        config.model.dynamics,
        sum(np.size(leaf) for leaf in jax.tree.leaves(agent.params)),
        *length,
        command,
        {
            key: (paper[key], value)
            for key, value in own.items()
            if key in paper and paper[key] != value and key.partition(".")[0] in learning
        },
    )


# --- pieces of the page


def text(value: Any) -> str:
    return html.escape(str(value))


def code(command: str) -> str:
    return f"<code>{text(command)}</code>"


def table(head: Sequence[Any], rows: Sequence[tuple[str, Sequence[str]]], css: str = "") -> str:
    """A table that scrolls by itself; rows are a class and cells, which are HTML."""
    lines = ["<tr>" + "".join(f"<th>{text(cell)}</th>" for cell in head) + "</tr>"]
    for kind, cells in rows:
        lines.append(f'<tr class="{kind}">' + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    return f'<div class="wide"><table class="{css}">{"".join(lines)}</table></div>'


def cell(mean: float, error: float | None, digits: int) -> str:
    """A number above its error, so that many fit beside each other."""
    number, _, noise = plus_minus(mean, error, digits).partition(" ")
    return number + (f"<small>{noise}</small>" if noise else "")


class Embedder:
    """Puts files into the page, as long as it stays small."""

    def __init__(self, where: Path, limit: int):
        self.where, self.left = where, limit

    def uri(self, path: Path, kind: str) -> str | None:
        size = -(-path.stat().st_size // 3) * 4
        if size > self.left:
            return None
        self.left -= size
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"

    def too_large(self, path: Path) -> str:
        size = path.stat().st_size / 1e6
        return f'<p class="missing">Left out, as the page is full: {text(path)}, {size:.1f} MB.</p>'

    def image(self, name: str, caption: str) -> str:
        """A figure; on a narrow screen it scrolls rather than shrinks to nothing."""
        path = self.where / name
        uri = self.uri(path, "image/png")
        if uri is None:
            return self.too_large(path)
        data = path.read_bytes()[:24]
        width, height = struct.unpack(">II", data[16:24])  # of a PNG
        return (
            f'<figure><img src="{uri}" width="{width}" height="{height}" alt="{text(caption)}" '
            f'style="min-width: {width // 2}px"><figcaption>{text(caption)}</figcaption></figure>'
        )

    def film(self, name: str, caption: str) -> str:
        path = self.where / name
        kind = "video/mp4" if path.suffix == ".mp4" else "image/gif"
        uri = self.uri(path, kind)
        if uri is None:
            return self.too_large(path)
        show = (
            f'<video controls loop muted playsinline preload="auto" src="{uri}"></video>'
            if path.suffix == ".mp4"
            else f'<img class="film" src="{uri}" alt="{text(caption)}">'
        )
        return f"<figure>{show}<figcaption>{text(caption)}</figcaption></figure>"


class Page:
    """The sections of one folder's page."""

    def __init__(self, results: Results, limit: int = LIMIT):
        self.results, self.embed = results, Embedder(results.where, limit)
        self.commands = commands(results)
        self.absent: list[str] = []

    def has(self, name: str) -> bool:
        return (self.results.where / name).exists()

    def missing(self, what: str, stage: str) -> str:
        self.absent.append(what)
        command = self.commands.get(stage, "make figures")
        return f'<p class="missing"><b>Missing: {text(what)}.</b> {code(command)} makes it.</p>'

    def figure(self, name: str, stage: str, caption: str) -> str:
        if self.has(name):
            return self.embed.image(name, caption)
        return self.missing(f"the figure {name}", stage)

    def made(self, *names: str) -> str:
        """What made the files of a section."""
        lines = []
        for name in names:
            header = self.results.headers.get(name)
            command = header["command"] if header else self.ran(name)
            if command:
                seconds = self.seconds(command)
                took = f" ({reproduce.length(seconds)})" if seconds else ""
                lines.append(f"{code(command)}{took}")
        return f'<p class="made">Made by {"; ".join(lines)}.</p>' if lines else ""

    def ran(self, stage: str) -> str | None:
        return self.results.times.get("stages", {}).get(stage, {}).get("command")

    def seconds(self, command: str) -> float | None:
        for stage in self.results.times.get("stages", {}).values():
            if stage["command"] == command and stage["done"]:
                return stage["seconds"]
        return None

    def mismatches(self) -> str:
        """The first section; those after it must have been made, for what they miss."""
        found = list(comparisons(self.results))
        off = [one for one in found if one.differs]
        said = list(claims(self.results))
        lines, tally = [], []
        for kind, title in KINDS.items():
            numbers = [one for one in found if one.kind == kind]
            off = [one for one in numbers if one.differs]
            failed = [claim for claim in said if claim.kind == kind and claim.holds is False]
            if numbers:
                tally.append(f"{title}: {len(off)} of {len(numbers)}")
            parts = [differences(off)] if off else []
            parts += [f"<q>{text(c.text)}</q> does not hold: {text(c.ours)}." for c in failed]
            if parts:
                lines.append(f"<b>{title}.</b> {' '.join(parts)} <i>Why:</i> {REASONS[kind]}")
        parts = ['<h2 id="mismatch">What does not match the paper</h2>']
        if found or said:
            apart = f" ({'; '.join(tally)})" if tally else ""
            parts.append(
                f"<p>{sum(one.differs for one in found)} of {len(found)} numbers differ from the "
                f"paper's by more than {NOISE} standard errors{apart}, and "
                f"{sum(claim.holds is False for claim in said)} of {len(said)} statements do not "
                "hold. Errors are over tracks, states or episodes of one agent: they leave out "
                "how training runs differ, of which the paper has two.</p>"
            )
        else:
            parts.append("<p>There are no numbers to compare.</p>")
        lines += [text(line) for line in self.conditions()]
        if self.absent:
            lines.append(f"<b>Not measured:</b> {text('; '.join(self.absent))}.")
        parts.append("<ul>" + "".join(f"<li>{line}</li>" for line in lines) + "</ul>")
        if said:
            verdicts = {True: "holds", False: "does not hold", None: "undecided: within the noise"}
            rows = [("", [text(c.text), f"<b>{verdicts[c.holds]}</b>", text(c.ours)]) for c in said]
            parts.append("<h3>The paper's statements</h3>")
            parts.append(table(["statement", "here", "ours"], rows, "words"))
        return "".join(parts)

    def conditions(self) -> list[str]:
        """Other than in the paper whatever the numbers are."""
        lines = []
        for name in self.results.agents:
            known = about(name)
            if known is None:
                lines.append(f"{Path(name).name} is not there any more: its run is not described.")
                continue
            paper = PAPER_LENGTH["parameters"].get(known.dynamics)
            length = "an unknown number of episodes"
            if known.episodes:
                share = known.episodes / PAPER_LENGTH["episodes"]
                length = f"{known.episodes:,} episodes, {100 * share:.2g}% of the paper's 5,000"
            size = f"{known.parameters / 1e6:.2g} million parameters"
            size += f" (the paper: {paper} million)" if paper else ""
            lines.append(
                f"{Path(name).name} was trained for {length}, once (the paper: twice); {size}."
            )
        tracks = {row["episodes"] for row in self.results.steps}
        if tracks and max(tracks) < PAPER_TRACKS:
            lines.append(f"Scores are of {max(tracks)} tracks, the paper's of {PAPER_TRACKS}.")
        states = {row["states"] for row in self.results.values}
        if states and max(states) < PAPER_STATES:
            lines.append(
                f"TD errors are of {max(states):,} states, the paper's of {PAPER_STATES:,}; drift "
                f"of {count(max(row['episodes'] for row in self.results.values), 'episode')}, the "
                "paper's of 100."
            )
        return lines

    def lengths(self) -> str:
        rows = []
        for name in self.results.agents:
            known = about(name)
            if known:
                cells = [known.dynamics, number(known.episodes), number(known.steps)]
                cells += ["" if known.hours is None else f"{known.hours:.2f}"]
                rows.append(("", [text(Path(name).name), *cells]))
        for row in self.results.curves:
            cells = [number(row["episodes"]), number(row["environment steps"])]
            cells = ["", *cells, f"{row['hours']:.2f}"]
            rows.append(("", [f"{text(row['label'])}, curve", *cells]))
        episodes, steps = (f"{PAPER_LENGTH[name]:,}" for name in ("episodes", "steps"))
        rows.append(("paper", ["paper, two of each", "both", episodes, steps, ""]))
        parts = ["<h2>Run lengths</h2>"]
        head = ["", "dynamics", "episodes", "steps", "hours"]
        parts.append(table(head, rows))
        parts.append(
            "<p>Steps are the environment's. A curve can go on after its agent was taken.</p>"
        )
        for name in self.results.agents:
            known = about(name)
            if known and known.command:
                parts.append(f"<p>{text(Path(name).name)}: {code(known.command)}</p>")
            if known and known.changes:
                changed = [
                    ("", [code(key), text(theirs), text(own)])
                    for key, (theirs, own) in known.changes.items()
                ]
                parts.append(
                    f"<details><summary>{text(Path(name).name)}: "
                    f"{count(len(changed), 'setting')} other than the paper's</summary>"
                    + table(["setting", "paper", "here"], changed, "words")
                    + "</details>"
                )
        return "".join(parts)

    def steps(self) -> str:
        parts = [
            "<h2>Return and variety against diffusion steps (Figure 3)</h2>",
            quoted(
                "At one step the diffusion model drives as well as the MLP within run-to-run "
                "variance. More steps slightly lower the return, and substantially raise the "
                "variety of imagined futures."
            ),
        ]
        if self.results.steps:
            rows = []
            for row in self.results.steps:
                score, lpips = steps_sweep.PAPER.get((row["dynamics"], row["steps"]), ("", ""))
                rows.append(
                    (
                        "",
                        [
                            text(label(row)),
                            number(row["steps"]),
                            cell(row["mean"], row["standard_error"], 0),
                            f"<i>{score}</i>",
                            f"{row['variety']:.2f}" if row["rollouts"] else "",
                            f"<i>{lpips}</i>",
                            f"{row['plan_ms']:.0f}",
                        ],
                    )
                )
            head = ["", "steps", "score", "paper", "variety", "paper: LPIPS", "plan, ms"]
            parts.append(table(head, rows))
            first = self.results.steps[0]
            cut = "" if whole(first) else f", cut after {first['max_steps']} frames"
            pairs = max(self.results.steps, key=lambda row: row["rollouts"])
            parts.append(
                f"<p>Score: mean and standard error over {count(first['episodes'], 'track')}"
                f"{cut}. Variety: "
                f"distance of imagined last latents, {count(pairs['rollouts'], 'rollout')} for "
                f"each of {count(pairs['pairs'], 'state')}; the paper's LPIPS is of decoded "
                "images, on another scale. The paper's two runs are given apart, read off its "
                "plot, over 100 tracks.</p>"
            )
            parts.append(self.figure("steps.png", "steps", "Return and variety"))
            parts.append(self.made("steps.json"))
        else:
            parts.append(self.missing("scores with more diffusion steps", "steps"))
        return "".join(parts)

    def curves(self) -> str:
        parts = [
            "<h2>Returns over training (Figure 4)</h2>",
            quoted(
                "Valdi matches the MLP baseline within run-to-run variance, over two runs each of "
                "5,000 episodes and 3 million environment steps."
            ),
        ]
        if self.results.curves:
            window = self.results.curves[0]["window"]
            rows = [
                (
                    "",
                    [
                        text(row["label"]),
                        number(row["episodes"]),
                        number(row["environment steps"]),
                        f"{row['hours']:.2f}",
                        f"{row['last']:.0f}",
                    ],
                )
                for row in self.results.curves
            ]
            head = ["run", "episodes", "steps", "hours", f"return, last {window}"]
            parts.append(table(head, rows))
        if self.has("curves.png"):
            caption = "Training returns with exploration noise; one run each"
            parts += [self.embed.image("curves.png", caption), self.made("curves.json")]
        else:
            parts.append(self.missing("curves of training", "curves"))
        return "".join(parts)

    def values(self) -> str:
        parts = [
            "<h2>Values along plans (Table 1)</h2>",
            quoted(
                "At short depth the diffusion model is less self-consistent and less grounded than "
                "the MLP; its error grows more slowly, and near the end of the plan it is better. "
                "The gaps are within run-to-run variance."
            ),
        ]
        if not self.results.values:
            return "".join([*parts, self.missing("values along plans", "values")])
        for kind, title in (("td", "TD error, h ="), ("drift", "drift, h =")):
            rows = []
            for row in self.results.values:
                cells = [cell(c["mean"], error_of(c), 2) for c in row[kind]]
                rows.append(("", [text(label(row)), *cells]))
            for dynamics, numbers in paper_values(kind).items():
                cells = [plus_minus(number, None, 2) for number in numbers]
                rows.append(("paper", [f"paper, {dynamics}", *cells]))
            head = [title, *[c["h"] for c in self.results.values[0][kind]]]
            parts.append(table(head, rows))
        parts += [
            f"<p>{text(label(row))}: {count(row['states'], 'state')} for the TD "
            f"error; drift over {count(row['episodes'], 'episode')} of "
            f"{row['steps']} decisions.</p>"
            for row in self.results.values
        ]
        parts.append(
            "<p>In rewards. TD error: R(z<sub>h</sub>, a<sub>h</sub>) + &gamma;<sup>C</sup> "
            "V(z<sub>h+1</sub>) &minus; V(z<sub>h</sub>) along the imagined plan. Drift: value of "
            "what came minus that of what had been imagined. ± is the larger of the standard "
            "errors over states and over episodes.</p>"
        )
        absent = {"diffusion", "mlp"} - {row["dynamics"] for row in self.results.values}
        parts += [
            self.missing(f"values along plans of the {dynamics} model", "values")
            for dynamics in sorted(absent)
        ]
        names = [name for name in self.results.headers if name.startswith("values")]
        return "".join([*parts, self.made(*names)])

    def films(self) -> str:
        found = [p for kind in ("mp4", "gif") for p in self.results.where.glob(f"plans*.{kind}")]
        found.sort(key=lambda path: path.stem)
        parts = [
            "<h2>Plans over the camera (Figure 1)</h2>",
            "<p>White: where the chosen plan leads. Coloured: random candidates, by the return "
            "that the model predicts for them. Below: predicted and received reward, and the "
            "value.</p>",
        ]
        if not found:
            return "".join([*parts, self.missing("films of plans", "plans")])
        parts.append('<div class="films">')
        parts += [
            self.embed.film(path.name, path.stem.partition("-")[2] or path.stem) for path in found
        ]
        return "".join([*parts, "</div>", self.made(*[path.stem for path in found])])

    def futures(self) -> str:
        parts = [
            "<h2>Unlike futures (Figure 5)</h2>",
            quoted(
                "From the same state and actions, with 8 diffusion steps, futures differ; the "
                "mean LPIPS between decoded last states is 0.006, 0.025, 0.033 and 0.040 with "
                "1, 2, 4 and 8 steps."
            ),
        ]
        if self.results.futures:
            names = ["pixels", "one_minus_ssim", "latents"]
            scored = any(row.get("lpips") is not None for row in self.results.futures)
            names += ["lpips"] if scored else []
            rows = []
            for steps, own in by_steps(self.results.futures).items():
                cells = []
                for name in names:
                    known = [row[name] for row in own if row.get(name) is not None]
                    numbers = summary(known) if known else None
                    digits = 2 if name == "latents" else 3
                    cells.append(
                        cell(numbers["mean"], numbers["standard_error"], digits) if numbers else ""
                    )
                paper = steps_sweep.PAPER.get(("diffusion", steps), ("", ""))[1]
                rows.append(("", [str(steps), *cells, f"<i>{paper}</i>"]))
            titles = {"pixels": "pixels", "one_minus_ssim": minus("1 - SSIM"), "latents": "latents"}
            head = ["steps", *[titles.get(name, "LPIPS") for name in names], "paper: LPIPS"]
            parts.append(table(head, rows))
            first = self.results.futures[0]
            states = len({row["pair"] for row in self.results.futures})
            parts.append(
                f"<p>Mean distances of all pairs of {count(first['rollouts'], 'future')}, ± over "
                f"{count(states, 'state')}."
                + ("" if scored else " LPIPS was not measured: the others are on other scales.")
                + "</p>"
            )
        if self.has("futures.png"):
            caption = "Above what came; below, futures of one plan that differ in noise alone"
            parts += [self.embed.image("futures.png", caption), self.made("futures.json")]
        else:
            parts.append(self.missing("decoded futures", "futures"))
        return "".join(parts)

    def decoder(self) -> str:
        parts = ["<h2>The decoder</h2>"]
        record = self.results.decoder
        if record:
            data, errors = record["data"], record["errors"]
            blind = data.get("constant_error")
            parts.append(
                f"<p>{record['parameters']:,} parameters, trained on {data['frames']:,} frames of "
                f"{count(data['episodes'], 'episode')} (the paper: 2,500 episodes) for "
                f"{count(record['trained']['updates'], 'update')}. Mean squared error on "
                f"{data['validation_frames']:,} frames held out: {errors['validation']:.5f}"
                + (f", that of the mean frame {blind:.5f}" if blind else "")
                + ".</p>"
            )
        if self.has("decoder/samples.png"):
            caption = "Frames of held-out episodes, and decoded from their latents"
            parts += [self.embed.image("decoder/samples.png", caption), self.made("decoder")]
        else:
            parts.append(self.missing("a decoder", "decoder"))
        return "".join(parts)

    def times(self) -> str:
        parts = ["<h2>How it was made</h2>"]
        stages = self.results.times.get("stages", {})
        if stages:
            rows = [
                (
                    "",
                    [
                        text(name),
                        reproduce.length(stage["seconds"])
                        + ("" if stage["done"] else ", not done"),
                        code(stage["command"]),
                    ],
                )
                for name, stage in stages.items()
                if name != "report"
            ]
            parts.append(table(["stage", "time", "command"], rows, "words"))
            total = sum(stage["seconds"] for name, stage in stages.items() if name != "report")
            cores = self.results.times["cores"]
            parts.append(
                f"<p>{reproduce.length(total)} in all; up to {count(cores, 'stage')} at a "
                "time. The time of a stage is that of all its attempts.</p>"
            )
        else:
            parts.append(
                f"<p>The times of the stages are unknown: {code('make figures')} measures them.</p>"
            )
        made = {}
        for header in self.results.headers.values():
            if "commit" in header:
                versions = ", ".join(f"{name} {v}" for name, v in header["versions"].items())
                where = f"{count(header['cpu'], 'core')}, {header['device']}"
                made[f"Commit {header['commit']}; {versions}; {where}."] = None
        parts += [f'<p class="made">{text(line)}</p>' for line in made]
        return "".join(parts)

    def html(self) -> str:
        sections: list[Callable[[], str]] = [
            self.lengths,
            self.steps,
            self.curves,
            self.values,
            self.films,
            self.futures,
            self.decoder,
            self.times,
        ]
        rest = "".join(section() for section in sections)
        trial = (
            '<p class="trial"><b>A trial (--quick).</b> Episodes are short and samples few: these '
            "numbers say that everything runs, and nothing else.</p>"
            if self.results.trial
            else ""
        )
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<link rel="icon" href="data:,"><title>Valdi, redone</title>'
            f"<style>{STYLE}</style></head><body><h1>Valdi's figures and table, redone</h1>"
            '<p>Beside the numbers of <a href="https://arxiv.org/abs/2607.00917">Value Diffusion '
            f"World Models</a> (Lindenberg &amp; Chitta, 2026).</p>{trial}{self.mismatches()}{rest}"
            "</body></html>\n"
        )


def quoted(statement: str) -> str:
    return f"<blockquote><p><b>The paper:</b> {text(statement)}</p></blockquote>"


def differences(off: Sequence[Comparison]) -> str:
    """Numbers of each agent, the paper's in brackets."""
    agents = []
    for agent in dict.fromkeys(one.agent for one in off):
        numbers = []
        for one in off:
            if one.agent == agent:
                paper = ", ".join(plus_minus(number, None, one.digits) for number in one.paper)
                numbers.append(
                    f"{one.what}: {plus_minus(one.ours, one.error, one.digits)} ({paper})"
                )
        agents.append(f"{agent} (in brackets the paper's), {'; '.join(numbers)}.")
    return text(" ".join(agents))


def number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def commands(results: Results) -> dict[str, str]:
    """The command of each stage: as it ran, else as it would for these agents."""
    agents = results.agents or list(reproduce.BOX)
    known: dict[str, str] = {}
    try:
        named = [reproduce.describe(name) for name in agents]
    except UsageError:  # one is gone
        named = [reproduce.describe(name) for name in reproduce.BOX]
    for stage in reproduce.stages(results.where, named, reproduce.Sizes()):
        known.setdefault(stage.name.partition("-")[0], stage.command)
        known[stage.name] = stage.command
    known |= {name: s["command"] for name, s in results.times.get("stages", {}).items()}
    return known


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args(argv).folder
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder")
    page = Page(read(folder))
    out = folder / reproduce.REPORT
    write_atomic(out, page.html().encode())
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB", file=sys.stdout)
    if page.absent:
        print(f"missing: {'; '.join(page.absent)}")
    return 0


if __name__ == "__main__":
    from valdi_jax import cli

    cli.run(main)
