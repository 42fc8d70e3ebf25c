"""The house: imports point down, heavy packages stay out, and an algorithm's pieces fit together."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import sharded_optim
from sharded_optim.algorithms import Algorithm
from sharded_optim.algorithms.adam import ADAM
from sharded_optim.algorithms.stable_adamw import STABLE_ADAMW

PACKAGE = Path(sharded_optim.__file__).parent
# A module may import from its own floor's package and from floors below. Modules of one floor in different rooms do not import each other,
# but for those listed in SEEN.
FLOORS = {
    "ranks": 1,
    "segment": 1,
    "formats": 1,
    "algorithms": 1,
    "backends": 2,
    "sharding": 2,
    "statistics": 2,
    "param_groups": 3,
    "state": 3,
    "coefficients": 3,
    "loading": 3,
    "engine": 3,
    "optimizers": 3,
    "__init__": 5,
}
# Statistics are laid out by the layout; floor 3 is a stack.
SEEN = {("statistics", "sharding"), ("loading", "state"), ("loading", "param_groups"), ("optimizers", "engine")}
SEEN |= {("engine", room) for room in ("coefficients", "loading", "param_groups", "state")}


def imports_of(path: Path) -> list[str]:
    """First name below `sharded_optim` of everything a module imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "sharded_optim" else [node.module or ""]
    return [name.split(".")[1] for name in found if name.startswith("sharded_optim.")]


def test_imports_point_down() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert room in FLOORS, f"{path} is on no floor: add it to FLOORS"
        for imported in imports_of(path):
            allowed = imported == room or FLOORS[imported] < FLOORS[room] or (room, imported) in SEEN
            assert allowed, f"{path.relative_to(PACKAGE)} on floor {FLOORS[room]} imports {imported} on floor {FLOORS[imported]}"


def test_nothing_in_the_package_imports_the_launcher_or_tests() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            assert not any(name.split(".")[0] in ("launch", "tests", "benchmarks") for name in names), path


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ["deepspeed", "triton", "numba", "mpi4py", "matplotlib", "pydantic", "rich", "safetensors", "torch.distributed.tensor"]
    code = (
        f"import torch, sys; before = set(sys.modules); import sharded_optim; print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("algorithm", [ADAM, STABLE_ADAMW], ids=lambda algorithm: algorithm.name)
def test_an_algorithm_takes_as_many_coefficients_as_are_computed(algorithm: Algorithm) -> None:
    group = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "decay_form": "coupled", "reference_lr": 1e-3}
    fixed = 1 + len(algorithm.state)  # the gradient and the state
    update = len(inspect.signature(algorithm.update).parameters)
    assert update == 1 + fixed + len(algorithm.coefficients(group, 1, 1.0))
    if algorithm.statistic is not None:
        observe = len(inspect.signature(algorithm.statistic.observe).parameters)
        assert observe == fixed + len(algorithm.statistic.coefficients(group, 1))
