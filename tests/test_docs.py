"""The documents build as a site, and their commands are options that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from valdi_jax.data import recorded
from valdi_jax.train import parse_arguments

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_site_builds_without_a_warning(tmp_path):
    build = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-q",
        "-d",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site/api.html").read_text()
    for name in ("valdi_jax.Agent.act", "valdi_jax.planners.plan", "valdi_jax.config.LearnConfig"):
        assert f'id="{name}"' in reference
    assert "denoises all 512 candidates" in (tmp_path / "site/index.html").read_text()


def commands():
    for page in PAGES:
        for line in page.read_text().splitlines():
            found = re.match(r" {4}(?:python -m valdi_jax\.train|valdi-train) ([^#]*)", line)
            if found and "--resume" not in line:
                yield pytest.param(found[1].split(), id=f"{page.stem}: {found[1].strip()}")


@pytest.mark.parametrize("options", list(commands()))
def test_documented_training_commands_parse(options, monkeypatch):
    monkeypatch.setattr(recorded, "_environment", lambda name: {})  # there are no data here
    named = [options[options.index(o) + 1] for o in ("--env", "--init-from") if o in options]
    chosen = named[0] if named else "carracing"
    assert parse_arguments(options).config.env.name == chosen
