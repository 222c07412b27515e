import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np

from valdi_jax import Agent

ROOT = Path(__file__).parent.parent


def test_the_python_example_runs_as_printed(optimized):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    shape, _, score = done.stdout.strip().rpartition(" ")
    assert shape == "(15, 3)"
    assert float(score) > 200  # untrained agents get about -30


def test_your_environment_trains_as_written(tmp_path, monkeypatch, optimized):
    training, several = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/your-environment.md").read_text(), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    Path("reach.py").write_text(training)
    done = subprocess.run([sys.executable, "reach.py"], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    printed = done.stdout
    summary = ast.literal_eval(printed[printed.rindex("{") :])
    # Standing still costs a distance of about 1 at each of the 30 steps.
    assert summary["mean"] > -15
    assert (tmp_path / "runs/reach/checkpoints/00000040").is_dir()

    names = runpy.run_path("reach.py")
    agent = Agent.load("runs/reach", make=names["make"])
    env = agent.make_env()
    observation, _ = env.reset(seed=0)
    standing_still = -30 * float(np.linalg.norm(observation["position"] - observation["target"]))
    assert standing_still < -30
    total, over = 0.0, False
    while not over:
        observation, reward, terminated, truncated, _ = env.step(agent.act(observation))
        total, over = total + reward, terminated or truncated
    assert total > 0.7 * standing_still

    drawn = names | {"agent": agent}
    agent.reset()
    exec(several, drawn)
    assert drawn["truncated"].all()  # their third episodes end


def test_every_file_that_the_readme_links_to_exists():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
