"""The package reads from top to bottom: a module imports only from those above it."""

import ast
from pathlib import Path

import valdi_jax

FOLDER = Path(valdi_jax.__file__).parent
ORDER = [
    *("errors", "config", "types", "augment", "layers", "normalizer", "encoder", "transformer"),
    *("heads", "diffusion", "sigreg", "dynamics", "model", "losses", "replay", "update", "planner"),
    *("envs.carracing_render", "envs.wrappers", "envs.carracing", "envs.spaces", "envs.workers"),
    *("envs", "collect", "cli", "integrity", "agents", "checkpoint", "progress", "evaluate"),
    *("learner", "train", "convert"),
]


def imports(path):
    """Every module that a file imports, in full."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules():
    for path in sorted(FOLDER.rglob("*.py")):
        name = ".".join(path.relative_to(FOLDER).with_suffix("").parts)
        if name != "__init__":
            yield name.removesuffix(".__init__"), path


def test_every_module_has_its_place():
    assert sorted(name for name, _ in modules()) == sorted(ORDER)


def test_modules_import_only_from_those_above_them():
    for name, path in modules():
        below = {f"valdi_jax.{other}" for other in ORDER[ORDER.index(name) + 1 :]}
        assert not below & set(imports(path)), name


def test_gymnasium_appears_only_where_environments_do():
    users = {name for name, path in modules() if "gymnasium" in set(imports(path))}
    assert users <= {
        "envs",
        "envs.carracing",
        "envs.carracing_render",
        "envs.spaces",
        "envs.workers",
        "envs.wrappers",
        "evaluate",
        "train",
    }
