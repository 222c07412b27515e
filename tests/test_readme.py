import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_python_example_runs_as_printed(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("(15, 3) ")


def test_every_file_that_the_readme_links_to_exists():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
