"""The examples of docs/extending.md, in files outside the package, as users write them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from valdi_jax.run.log import read_jsonl

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL))


@pytest.mark.parametrize("name", FILES)
def test_an_example_is_short(name):
    assert FILES[name].count("\n") < 60


def test_a_dynamics_a_planner_and_a_term_from_outside_train_and_resume(tmp_path):
    assert set(FILES) == {"linear.py", "sampling.py", "inverse.py", "main.py"}
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)

    def run(arguments):
        subprocess.run([sys.executable, *arguments], cwd=tmp_path, check=True, env=os.environ)

    run(["main.py"])
    directory = tmp_path / "runs" / "extended"
    records = read_jsonl(directory / "metrics.jsonl")
    assert len(records) == 6
    losses = [record["loss/inverse"] for record in records if "loss/inverse" in record]
    assert losses
    assert np.isfinite(losses).all()
    assert records[-1]["inverse/error"] > 0
    more = FILES["main.py"].replace(
        'train(config, Path("runs/extended"))',
        'train(config.replace(collect={"episodes": 7}), Path("runs/extended"), resume=True)',
    )
    (tmp_path / "main.py").write_text(more)
    run(["main.py"])
    assert len(read_jsonl(directory / "metrics.jsonl")) == 7
    evaluation = ["-m", "valdi_jax.evaluate", "runs/extended", "--episodes", "1", "--env.import"]
    paths = {"PYTHONPATH": os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, *evaluation, "linear", "inverse", "sampling"]
    subprocess.run(command, cwd=tmp_path, check=True, env=os.environ | paths)
