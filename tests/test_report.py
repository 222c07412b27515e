"""The page of the paper's figures and table: what it says, that it opens, and what makes it."""

import html
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from valdi_jax.errors import UsageError
from valdi_jax.run.agents import locate
from valdi_jax.train import parse_arguments

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HEADER = {
    "commit": "abc",
    "versions": {"python": "3.11"},
    "cpu": 2,
    "device": "cpu",
}


@pytest.fixture
def script(monkeypatch):
    """Import an experiment as it is imported when started: its folder leads the path."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    return importlib.import_module


def write(path, name, rows):
    path.write_text(json.dumps(HEADER | {"command": f"python experiments/{name}", "rows": rows}))


def score(agent, dynamics, steps, mean):
    known = {
        "agent": agent,
        "dynamics": dynamics,
        "steps": steps,
        "mean": mean,
        "futures": 1,
        "digest": "d",
    }
    amounts = {"episodes": 20, "max_steps": 600, "pairs": 8, "rollouts": 100 if steps else 0}
    amounts |= {"returns": [mean - 10.0, mean + 10.0] * 10, "plan_times": [24.0] * 20}
    return (
        known | amounts | {"standard_error": 10.0, "plan_ms": 24.0, "variety": 0.1 * (steps or 0)}
    )


def values(agent, dynamics, td, drift):
    cells = {
        kind: [
            {"h": h, "mean": mean, "standard_error": 0.1, "episode_error": 0.2, "count": 9}
            for h, mean in enumerate(means, kind == "drift")
        ]
        for kind, means in (("td", td), ("drift", drift))
    }
    return {"agent": agent, "dynamics": dynamics, "episodes": 25, "steps": 200, "states": 5} | cells


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A film, written by a process of its own: the writer forks, which JAX's threads forbid."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    program = (
        "import sys, numpy as np\nfrom imageio import v3 as imageio\n"
        "film = np.zeros((8, 64, 64, 3), np.uint8)\n"
        "imageio.imwrite(sys.argv[1], film, fps=10, plugin='FFMPEG')\n"
    )
    subprocess.run([sys.executable, "-c", program, path], check=True)
    return path


@pytest.fixture
def no_decoders(script, monkeypatch, tmp_path):
    """The agents in the box come without decoders."""
    monkeypatch.setattr(script("decoder"), "SHIPPED", tmp_path / "none")


@pytest.fixture
def folder(tmp_path, film, no_decoders):
    """A folder with all that the scripts write. The paper's numbers, but for what is said."""
    from imageio import v3 as imageio

    rows = [
        score("carracing", "diffusion", 1, 790),  # between the paper's 783 and 799
        score("carracing", "diffusion", 8, 750),  # below its 771 and 775 by 2.1 errors
        score("carracing-mlp", "mlp", None, 740),  # below by 1
    ]
    write(tmp_path / "steps.json", "steps_sweep.py", rows)
    own = values(
        "carracing", "diffusion", (3.28, 2.17, 2, 1.93, 0.55), (-1.53, -2.11, -2.56, -3.04, -3.52)
    )
    write(tmp_path / "values-carracing.json", "value_diagnostics.py", [own])
    own = values(
        "carracing-mlp", "mlp", (2.05, 2, 2.07, 2.19, 2.23), (-0.62, -1.21, -1.93, -2.76, -3.65)
    )
    write(tmp_path / "values-carracing-mlp.json", "value_diagnostics.py", [own])
    futures = [
        {"agent": "carracing", "steps": 8, "pair": pair, "rollouts": 100, "max_steps": 600}
        | {"pixels": 0.1, "one_minus_ssim": 0.2, "latents": 0.6, "lpips": lpips}
        for pair, lpips in enumerate((0.020, 0.022))
    ]
    write(tmp_path / "futures.json", "diverse_futures.py", futures)
    ends = {"episodes": 300, "environment steps": 1234, "hours": 2.5, "window": 20, "last": 700.0}
    write(tmp_path / "curves.json", "training_curves.py", [{"label": "mine", "run": "r"} | ends])
    decoder = tmp_path / "decoder"
    decoder.mkdir()
    record = {
        "agent": "carracing",
        "command": "python experiments/decoder.py",
        "parameters": 5,
        "data": {"frames": 7, "validation_frames": 3, "episodes": 2, "constant_error": 0.02},
        "errors": {"validation": 0.01},
        "trained": {"updates": 9},
    }
    (decoder / "decoder.json").write_text(json.dumps(record))
    picture = np.random.default_rng(0).integers(255, size=(40, 1200, 3), dtype=np.uint8)
    for name in ("steps.png", "curves.png", "futures.png", "decoder/samples.png"):
        imageio.imwrite(tmp_path / name, picture)
    shutil.copy(film, tmp_path / "plans-carracing.mp4")
    stage = {"command": "python experiments/steps_sweep.py", "seconds": 600.0, "done": True}
    (tmp_path / "times.json").write_text(json.dumps({"cores": 2, "stages": {"steps": stage}}))
    return tmp_path


def page_of(report, folder):
    assert report.main([str(folder)]) == 0
    return re.sub(r"\s+", " ", (folder / "report.html").read_text())  # as a browser reads it


def mismatches(page):
    """The first section, without the table of statements."""
    start = page.index("<h2")
    return html.unescape(page[start : page.index("<h3", start)])


def test_what_does_not_match_comes_first_and_nothing_else_is_said_not_to(script, folder):
    page = page_of(script("report"), folder)
    first = mismatches(page)
    assert first.startswith('<h2 id="mismatch">What does not match the paper</h2>')
    assert "3 of 24 numbers differ" in first
    assert "8 steps: 750 ± 10 (771, 775)" in first
    assert "h = 4: 0.55 ± 0.20 (1.95)" in first
    assert "8 steps: 0.021 ± 0.001 (0.040)" in first
    assert "carracing with 8 steps scores lower" in page
    assert "h = 3" not in first
    assert "Drift of values along plans.</b>" not in first
    assert first.count("<i>Why:</i>") == 3
    assert "carracing was trained for 554 episodes, 11% of the paper's 5,000" in first
    assert "Scores are of 20 tracks" in first


def test_statements_are_judged_by_the_noise(script, folder):
    report = script("report")
    said = {claim.text: claim.holds for claim in report.claims(report.read(folder))}
    assert said["At one diffusion step, the score is the MLP's."] is False
    assert said["More diffusion steps do not raise the score."] is True
    assert said["Drift grows along the plan (diffusion)."] is True
    assert said["At the start of the plan, the mlp model's errors are the smaller ones."] is True
    end = "At the end of the plan, the diffusion model's errors are the smaller ones."
    assert said[end] is None  # drift of -3.52 and -3.65, with errors of 0.2
    seeds = [score(name, "diffusion", n, 790) for name in ("carracing", "other") for n in (1, 2)]
    write(folder / "steps.json", "", seeds)
    said = {claim.text: claim.holds for claim in report.claims(report.read(folder))}
    assert said["More diffusion steps imagine more variety."] is True  # within one agent
    write(folder / "steps.json", "", [score("carracing", "diffusion", n, 790) for n in (1, 2)])
    tracks = np.linspace(400, 1000, 20)  # which differ by far more than any gain
    for gain, holds in (
        (np.tile([50.0, 70.0], 10), False),
        (np.tile([-9.0, 11.0], 10), True),
        (np.tile([-200.0, 210.0], 10), None),  # a relevant one may be hidden
        ([20.0], None),  # of one episode
    ):
        returns = [list(tracks[: len(gain)]), list(tracks[: len(gain)] + gain)]
        rows = [
            score("carracing", "diffusion", n, float(np.mean(each))) | {"returns": each}
            for n, each in enumerate(returns, 1)
        ]
        write(folder / "steps.json", "", rows)
        said = {claim.text: claim.holds for claim in report.claims(report.read(folder))}
        assert said["More diffusion steps do not raise the score."] is holds


def test_rows_of_a_sweep_are_shown_by_agent_steps_and_futures(script, folder):
    ways = [("b", 8, 2), ("a", 2, 1), ("b", 1, 1), ("b", 8, 1), ("a", 1, 1)]
    rows = [score(agent, "diffusion", steps, 700) | {"futures": m} for agent, steps, m in ways]
    write(folder / "steps.json", "steps_sweep.py", [*rows, score("c", "mlp", None, 700)])
    shown = script("report").read(folder).steps
    assert [(row["agent"], row["steps"], row["futures"]) for row in shown] == [
        *[("b", 1, 1), ("b", 8, 1), ("b", 8, 2), ("a", 1, 1), ("a", 2, 1), ("c", None, 1)]
    ]


def test_short_episodes_are_not_compared_and_the_page_says_that_it_is_a_trial(script, folder):
    report = script("report")
    rows = [score("carracing", "diffusion", 1, 31) | {"max_steps": 60}]
    write(folder / "steps.json", "steps_sweep.py --quick", rows)
    page = page_of(report, folder)
    assert "A trial (--quick)" in page
    assert not [one for one in report.comparisons(report.read(folder)) if one.kind == "score"]


def test_missing_pieces_are_named_with_what_makes_them(script, folder):
    report = script("report")
    whole = page_of(report, folder)
    assert "Missing" not in whole
    assert "(10.0 min)" in whole
    for name in ("futures.json", "futures.png", "values-carracing-mlp.json", "steps.png"):
        (folder / name).unlink()
    page = page_of(report, folder)
    for what, command in (
        ("decoded futures", "diverse_futures.py carracing"),
        ("values along plans of the mlp model", "value_diagnostics.py carracing"),
        ("the figure steps.png", "steps_sweep.py"),
    ):
        assert re.search(f"Missing: {what}.</b> <code>python experiments/{command}", page), what
        assert what in mismatches(page)


def test_an_empty_folder_is_a_page_of_what_is_missing(script, no_decoders, tmp_path):
    page = page_of(script("report"), tmp_path)
    assert "There are no numbers to compare" in page
    assert page.count("Missing: ") == 6
    with pytest.raises(UsageError, match="is no folder"):
        script("report").main([str(tmp_path / "none")])
    (tmp_path / "steps.json").write_text('{"rows": 3}')
    with pytest.raises(UsageError, match=r"steps\.json is not what the scripts write"):
        script("report").main([str(tmp_path)])


def test_the_page_stays_small(script, folder):
    report = script("report")
    page = report.render(report.read(folder), limit=300_000)  # a picture is some 192,000
    assert page.count("<img ") == 1
    assert page.count("Left out, as the page is full") == 3
    assert len(page) < 400_000


def test_decoders_of_the_box_are_used_and_shown(script, tmp_path):
    report, reproduce = script("report"), script("reproduce")
    given = reproduce.describe("carracing")
    stages = {stage.name: stage for stage in reproduce.stages(tmp_path, [given], reproduce.QUICK)}
    assert "decoder" not in stages
    assert "carracing experiments/decoders/carracing " in stages["futures"].command
    assert stages["futures"].needs == ()
    write(tmp_path / "steps.json", "steps_sweep.py", [score("carracing", "diffusion", 1, 790)])
    page = page_of(report, tmp_path)
    assert "carracing: 1,640,192 parameters, trained on 12,028 frames of 60 episodes" in page
    assert "held out: 0.00129, that of the mean frame 0.00731" in page
    assert "Made by <code>python experiments/decoder.py carracing --episodes 60" in page
    assert page.count("<img ") == 1
    assert "Missing: a decoder" not in page


def test_each_agent_s_decoder_has_its_own_record(script, tmp_path, monkeypatch):
    report, reproduce = script("report"), script("reproduce")
    shipped = reproduce.ROOT / "experiments/decoders/carracing"
    monkeypatch.setattr(script("decoder"), "SHIPPED", tmp_path / "decoders")
    for name in ("carracing", "carracing-mlp"):
        copy = shutil.copytree(shipped, tmp_path / "decoders" / name)
        record = json.loads((copy / "decoder.json").read_text())
        record |= {"agent": name, "command": f"decoder.py {name} --out x"}
        (copy / "decoder.json").write_text(json.dumps(record))
    page = page_of(report, tmp_path)
    assert page.count("<img ") == 2
    for name in ("carracing", "carracing-mlp"):
        assert f"<p>{name}: 1,640,192 parameters" in page
        assert f"Made by <code>decoder.py {name} --out x</code>.</p>" in page


def test_another_agent_gets_a_decoder_of_its_own(script, tmp_path):
    report, reproduce = script("report"), script("reproduce")
    own = shutil.copytree(locate(Path("carracing")), tmp_path / "agents/carracing")
    stages = reproduce.stages(tmp_path, [reproduce.describe(str(own))], reproduce.QUICK)
    futures = next(stage for stage in stages if stage.name == "futures")
    assert futures.needs == ("decoder",)
    assert f"{own} {tmp_path}/decoder " in futures.command
    write(tmp_path / "steps.json", "steps_sweep.py", [score(str(own), "diffusion", 1, 790)])
    page = page_of(report, tmp_path)
    assert f"Missing: a decoder.</b> <code>python experiments/decoder.py {own}" in page


PROBE = """<script>
addEventListener("load", async () => {
  const all = name => [...document.querySelectorAll(name)];
  for (let i = 0; i < 50 && all("video").some(v => v.readyState < 2); i++)
    await new Promise(done => setTimeout(done, 100));
  document.body.style.width = "375px";
  document.title = JSON.stringify({
    images: all("img").map(i => i.complete ? i.naturalWidth : 0),
    films: all("video").map(v => v.readyState < 2 ? 0 : v.videoWidth),
    fetched: performance.getEntriesByType("resource").map(e => e.name.slice(0, 30))
      .filter(name => !name.startsWith("data:")),
    wide: document.body.scrollWidth,
  });
});
</script>"""


def browse(path, tmp_path):
    """What Chromium makes of a page, and what it complains of."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    command += [
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--autoplay-policy=no-user-gesture-required",
    ]
    command += ["--virtual-time-budget=8000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search("<title>(.*?)</title>", done.stdout)
    return found[1], [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_opens_whole_in_a_browser_and_fetches_nothing(script, folder, tmp_path):
    page = page_of(script("report"), folder)
    sources = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')>\s]{1,30})""", page)
    assert {s.partition(":")[0] for s in sources} == {"data", "https"}
    assert [s for s in sources if s.startswith("https")] == ["https://arxiv.org/abs/2607.009"]
    # Before the policy, which lets no script of the page run.
    probed = folder / "probed.html"
    probed.write_text(page.replace("<head>", f"<head>{PROBE}", 1))
    title, complaints = browse(probed, tmp_path)
    assert complaints == []
    seen = json.loads(title)
    assert seen == {"images": [1200] * 4, "films": [64], "fetched": [], "wide": 375}


# --- what runs the stages


def toy(reproduce, out, name, *, code="", needs=(), keeps=()):
    """A stage that writes its name, and a line into a common file each time it runs."""
    path = out / name
    body = f"open({str(out / 'ran')!r}, 'a').write('{name} '); {code}; open({str(path)!r}, 'w')"
    return reproduce.Stage(name, f'python -c "{body}"', (path,), needs, keeps)


def go(reproduce, out, stages, cores=1):
    with (out / "lock").open("w") as lock:
        done = reproduce.Runner(out, stages, cores).run(lock.fileno())
    ran = out / "ran"
    said = ran.read_text().split() if ran.exists() else []
    ran.unlink(missing_ok=True)
    return done, said


def test_stages_that_are_done_are_skipped_and_what_needs_others_follows_them(script, tmp_path):
    reproduce = script("reproduce")
    first = toy(reproduce, tmp_path, "first", code="pass")
    asks = f"open({str(tmp_path / 'asked for')!r})"
    second = toy(reproduce, tmp_path, "second", code=asks, needs=["first"])
    third = toy(reproduce, tmp_path, "third", code="pass", needs=["second"])
    assert go(reproduce, tmp_path, [first, second, third]) == (False, ["first", "second"])
    assert "No such file" in (tmp_path / "logs/second.log").read_text()
    times = json.loads((tmp_path / "times.json").read_text())["stages"]
    assert {name: stage["done"] for name, stage in times.items()} == {
        "first": True,
        "second": False,
    }
    with pytest.raises(UsageError, match="holds results of another command"):
        go(reproduce, tmp_path, [first._replace(command="python -V")])
    with pytest.raises(UsageError, match=r"holds results of , not of runs/a/checkpoints/00000009"):
        reproduce.Runner(tmp_path, [first], 1, ["runs/a/checkpoints/00000009"])
    (tmp_path / "asked for").touch()
    assert go(reproduce, tmp_path, [first, second, third]) == (True, ["second", "third"])
    assert go(reproduce, tmp_path, [first, second, third]) == (True, [])
    (tmp_path / "second").unlink()
    assert go(reproduce, tmp_path, [first, second, third]) == (True, ["second", "third"])


def test_an_interrupt_is_passed_on_once_and_the_same_command_goes_on(script, tmp_path):
    reproduce = script("reproduce")
    program = tmp_path / "slow.py"
    program.write_text(
        "import sys, time, pathlib\n"
        "kept, out = map(pathlib.Path, sys.argv[1:])\n"
        "if not kept.exists():\n"
        "    try:\n"
        "        print('started', flush=True)\n"
        "        for _ in range(600):\n"
        "            time.sleep(0.1)\n"  # a signal just before a sleep does not end it
        "    except KeyboardInterrupt:\n"
        "        time.sleep(0.3)\n"
        "        kept.write_text('half')\n"
        "        sys.exit()\n"
        "time.sleep(0.2)\n"
        "out.write_text(kept.read_text())\n"
    )
    kept, out = tmp_path / "kept", tmp_path / "out"
    command = f"python {program} {kept} {out}"
    slow = reproduce.Stage("slow", command, (kept, out), keeps=(kept,))
    after = toy(reproduce, tmp_path, "after", code="pass", needs=["slow"])

    def interrupt():
        while "started" not in log.read_text():
            pass
        os.kill(os.getpid(), signal.SIGINT)

    log = tmp_path / "logs/slow.log"
    log.parent.mkdir()
    log.touch()
    assert threading.current_thread() is threading.main_thread()  # which gets the signal
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        go(reproduce, tmp_path, [slow, after])
    thread.join()
    assert kept.read_text() == "half"  # it was waited for
    first = json.loads((tmp_path / "times.json").read_text())["stages"]
    assert [stage["done"] for stage in first.values()] == [False]
    assert first["slow"]["seconds"] >= 0.3
    assert go(reproduce, tmp_path, [slow, after]) == (True, ["after"])
    assert out.read_text() == "half"
    then = json.loads((tmp_path / "times.json").read_text())["stages"]
    assert then["slow"]["seconds"] > first["slow"]["seconds"]  # of both attempts


def test_two_stages_at_a_time_wait_for_what_they_need(script, tmp_path):
    reproduce = script("reproduce")
    nap = "__import__('time').sleep(1)"
    after = "; ".join(f"open({str(tmp_path / name)!r})" for name in ("long", "longer"))
    stages = [
        toy(reproduce, tmp_path, "long", code=nap),
        toy(reproduce, tmp_path, "longer", code=f"{nap}; {nap}"),
        toy(reproduce, tmp_path, "last", needs=["long", "longer"], code=after),
    ]
    done, ran = go(reproduce, tmp_path, stages, cores=2)
    assert done
    assert set(ran[:2]) == {"long", "longer"}
    assert ran[2:] == ["last"]


def test_a_second_process_in_a_folder_is_refused(script, tmp_path):
    import fcntl

    reproduce = script("reproduce")
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another process makes the figures"):
            reproduce.main(["--out", str(tmp_path)])


@pytest.mark.parametrize("quick", [False, True])
def test_the_commands_of_all_stages_are_those_of_the_scripts(script, tmp_path, quick):
    reproduce = script("reproduce")
    sizes = reproduce.QUICK if quick else reproduce.Sizes()
    agents, train = reproduce.training(tmp_path, "--preset tiny --seed 3")
    for stage, kind in zip(train, ("diffusion", "mlp"), strict=True):
        config = parse_arguments(reproduce.attempt(stage)[3:]).config
        assert (config.model.dynamics, config.env.name) == (kind, "carracing")
    (tmp_path / "mlp").mkdir()
    (tmp_path / "mlp/config.json").touch()
    assert reproduce.attempt(train[1])[3:] == ["--resume", str(tmp_path / "mlp")]
    stages = {s.name: s for s in reproduce.stages(tmp_path, agents, sizes, ["train-diffusion"])}
    assert all("train-diffusion" in stage.needs for stage in stages.values())
    assert stages["futures"].needs == ("train-diffusion", "decoder")
    scores = [f"scores-diffusion-{part + 1}" for part in range(len(sizes.steps))]
    assert stages["steps"].needs == ("train-diffusion", *scores, "scores-mlp-1")
    for name in (*scores, "scores-mlp-1"):
        assert f"{name}.json" in stages["steps"].command.partition("--known")[2]
    for name, module in (
        ("decoder", "decoder"),
        ("futures", "diverse_futures"),
        ("plans-mlp", "plan_video"),
    ):
        words = reproduce.attempt(stages[name])
        assert words[1] == f"experiments/{module}.py"
        script(module).parse_arguments(words[2:])


@pytest.mark.slow
def test_a_trial_of_all_stages_makes_a_whole_page(tmp_path):
    command = [sys.executable, "experiments/reproduce.py", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "report.html").read_text()
    assert "A trial (--quick)" in page
    assert "Missing" not in page
