"""Shared fixtures: the reference numbers, and small configurations."""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import shutil
import signal
import tempfile
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from valdi_jax.config import Config
from valdi_jax.convert import params_from_reference
from valdi_jax.dynamics.diffusion import DiffusionDraws
from valdi_jax.dynamics.flow import FlowDraws
from valdi_jax.observation import Observation
from valdi_jax.presets import PRESETS
from valdi_jax.types import Batch, Draws

FAULTS: dict[str, dict[str, int]] = {}  # outcomes by fault, from test_faults.py
PARITY = Path(__file__).parent / "parity"


# Most programs here run for milliseconds: an update then compiles in 1.5 s instead of 8. XLA aborts
# on flags that it does not know: drop one that a later version lacks.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_llvm_disable_expensive_passes=true"
)


def pytest_configure(config):
    """Settings shared by the parallel test processes and those that they start."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # they share a GPU
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    flags = os.environ.get("XLA_FLAGS", "")
    if QUICK not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {QUICK}".strip()
    # Forbid implicit rank promotion.
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # Otherwise most of the time goes into compiling what another test has compiled.
        directory = tempfile.mkdtemp(prefix="valdi-jax-tests-")
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


# The files that take longest, so that no process is left alone with one at the end.
DEAREST = (
    "devices",
    "processes",
    "readme",
    "learning",
    "faults",
    "commands",
    "train",
    "extending",
    "parity",
)


def pytest_collection_modifyitems(items):
    """Begin with the dearest files."""

    def place(item):
        name = item.path.stem.removeprefix("test_")
        return DEAREST.index(name) if name in DEAREST else len(DEAREST)

    items.sort(key=place)


def pytest_terminal_summary(terminalreporter):
    """Print the table of faults (docs/reliability.md)."""
    for fault, outcomes in FAULTS.items():
        terminalreporter.write_line(
            f"{fault:<28}" + "  ".join(f"{name} {times}" for name, times in outcomes.items())
        )


@pytest.fixture
def optimized(monkeypatch):
    """Processes that the test starts compile as for users: for those that run long."""
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace(QUICK, ""))


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """Keep a process that runs hundreds of tests below its limit of memory maps (65,530 on Linux).

    Each program compiled for a CPU holds several; 44,000 were counted near the end of a run.
    """
    yield
    jax.clear_caches()


def reference_tensors(dynamics: str, prefix: str = "") -> dict[str, np.ndarray]:
    """The reference's weights, rebuilt from their names (tests/parity/README.md)."""
    shapes = json.loads((PARITY / f"{dynamics}_parameters.json").read_text())
    return {name: reference_tensor(prefix + name, tuple(shape)) for name, shape in shapes.items()}


def reference_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    draws = np.random.RandomState(zlib.crc32(f"public:{name}".encode())).standard_normal(shape)
    if name.endswith("bias"):
        draws = 0.1 * draws
    elif "marker" in name:
        draws = 0.5 * draws
    elif "diffusion_step_emb" in name:
        pass
    elif len(shape) == 1:
        draws = 1 + 0.1 * draws
    else:
        draws = draws / np.sqrt(np.prod(shape[1:]))
    return draws.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Parity:
    """One reference file with everything needed to reproduce it."""

    config: Config
    numbers: dict[str, np.ndarray]
    params: dict
    ema_params: dict
    batch: Batch
    draws: Draws

    def __getitem__(self, key: str) -> np.ndarray:
        return self.numbers[key]


def dynamics_draws(dynamics: str, numbers: dict[str, np.ndarray]) -> Any:
    if dynamics == "diffusion":
        return DiffusionDraws(numbers["eps"], numbers["step"].astype(np.int32))
    return FlowDraws(numbers["eps"], numbers["time"]) if dynamics == "flow" else None


@pytest.fixture(scope="session", params=["diffusion", "mlp", "flow"])
def parity(request) -> Parity:
    config = dataclasses.replace(
        PRESETS["paper"],
        model=dataclasses.replace(PRESETS["paper"].model, dynamics=request.param),
    )
    with np.load(PARITY / f"official_{request.param}.npz", allow_pickle=False) as file:
        numbers = dict(file)
    if request.param == "flow":  # arrays shared with diffusion are stored once
        with np.load(PARITY / "official_diffusion.npz", allow_pickle=False) as file:
            numbers = dict(file) | numbers
    batch = Batch(
        observations=Observation(image=numbers["rgb"], vector=numbers["proprio"]),
        actions=numbers["actions"],
        rewards=numbers["rewards"],
        terminals=np.zeros(numbers["actions"].shape[:2], np.float32),
    )
    draws = {"sigreg": numbers["slices"], "dynamics": dynamics_draws(request.param, numbers)}
    with jax.default_device(jax.devices("cpu")[0]):
        params, ema_params = (
            params_from_reference(reference_tensors(request.param, prefix), config)
            for prefix in ("", "target:")
        )
    return Parity(config, numbers, params, ema_params, batch, draws)
