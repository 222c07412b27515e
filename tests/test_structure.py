"""The order of the modules: each imports only from those above it."""

import ast
import subprocess
import sys
from pathlib import Path

import valdi_jax

FOLDER = Path(valdi_jax.__file__).parent
ORDER = [
    *("errors", "registry", "observation", "config", "presets", "types", "diffusion"),
    *("networks", "networks.layers", "networks.normalizer", "networks.encoder"),
    *("networks.transformer", "networks.heads", "networks.twohot", "networks.tdmpc2"),
    *("networks.scaler", "networks.unet", "networks.decoder"),
    *("dynamics.base", "dynamics.diffusion", "dynamics.flow", "dynamics.mlp", "dynamics.simplex"),
    *("dynamics", "model"),
    *("planners.base", "planners.cem", "planners.icem", "planners.mbdpo", "planners.mppi"),
    *("planners.scoring", "planners.sampling", "planners.guided", "planners.diffuser", "planners"),
    *("data", "data.episode", "data.augment", "data.windows"),
    *("losses.base", "losses.dynamics", "losses.reward", "losses.value", "losses.sigreg"),
    *("losses.q", "losses.energy", "losses.policy", "losses.plans"),
    *("losses.prior", "losses"),
    *("data.replay", "data.store", "updates"),
    *(
        "envs.carracing_render",
        "envs.wrappers",
        "envs.carracing",
        "envs.dmc",
        "envs.maze",
        "envs.spaces",
    ),
    *("envs.workers", "envs", "data.recorded", "data.rollout", "data.collector"),
    *("run", "run.manifest", "compilation"),
    *("data.cluster", "data.source", "cli"),
    *(
        "run.agents",
        "run.rundir",
        "run.npz",
        "run.checkpoint",
        "run.stored",
        "run.video",
        "run.wandb",
        "run.processes",
        "run.learner",
    ),
    *("run.notes", "run.log", "run.display", "run.reporter", "run.rounds", "run.saver", "run.loop"),
    *("train", "evaluate", "agent", "record", "checkpoint", "convert"),
]


def imports(path):
    """Full names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the whole package"
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
        "agent",
        "envs",
        "envs.carracing",
        "envs.carracing_render",
        "envs.dmc",
        "envs.maze",
        "envs.spaces",
        "envs.workers",
        "envs.wrappers",
        "data.source",
        "evaluate",
        "record",
        "run.loop",
        "run.video",
        "train",
    }


def test_planners_import_no_update_data_environment_or_run():
    for name, path in modules():
        if name.startswith("planners"):
            parts = {other.split(".")[1] for other in imports(path) if "valdi_jax." in other}
            assert not parts & {"updates", "losses", "data", "envs", "run"}, name
            if name not in ("planners", "planners.scoring", "planners.guided", "planners.diffuser"):
                assert "model" not in parts, name


def test_an_environments_process_needs_no_jax():
    code = "import sys, valdi_jax.train, valdi_jax.envs.workers; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
