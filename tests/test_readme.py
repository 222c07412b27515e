import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_python_example_runs_as_printed(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("(15, 3) ")


def test_your_environment_trains_as_written(tmp_path, monkeypatch, capsys):
    (program,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/your-environment.md").read_text(), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "your-environment.md", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    summary = ast.literal_eval(printed[printed.rindex("{") :])
    # Who stays where it is pays about a distance of 1 at each of the 30 steps.
    assert summary["mean"] > -10
    assert (tmp_path / "runs/reach/checkpoints/00000040").is_dir()


def test_every_file_that_the_readme_links_to_exists():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
