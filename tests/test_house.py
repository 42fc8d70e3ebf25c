"""The house: imports point down, heavy packages stay out, and an algorithm's pieces fit together."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sharded_optim
from sharded_optim.algorithms import Algorithm, operations
from sharded_optim.algorithms.adam import ADAM, AMSGRAD
from sharded_optim.algorithms.scalars import sqrt
from sharded_optim.algorithms.sgd import MOMENTUM, SGD
from sharded_optim.algorithms.stable_adamw import STABLE_ADAMW
from sharded_optim.algorithms.weight_decay import FORMS

PACKAGE = Path(sharded_optim.__file__).parent
GROUP = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "decay_form": "coupled", "reference_lr": 2e-2}
GROUP |= {"momentum": 0.9, "dampening": 0.0, "nesterov": False}
# A module may import from its own floor's package and from floors below. Modules of one floor in different rooms do not import each other,
# but for those listed in SEEN.
FLOORS = {
    "ranks": 1,
    "version": 1,
    "buckets": 1,
    "devices": 1,
    "consensus": 1,
    "hooks": 1,
    "names": 1,
    "segment": 1,
    "shapes": 1,
    "formats": 1,
    "memory": 1,
    "noise": 1,
    "position_hash": 1,
    "algorithms": 1,
    "backends": 2,
    "sharding": 2,
    "statistics": 2,
    "options": 3,
    "param_groups": 3,
    "param_index": 3,
    "state": 3,
    "compensation": 3,
    "coefficients": 3,
    "foreign_state": 3,
    "loading": 3,
    "metrics": 3,
    "functional": 3,
    "layouts": 3,
    "stateful": 3,
    "batches": 3,
    "engine": 3,
    "optimizers": 3,
    "plan": 3,
    "deepspeed": 4,
    "gradient_release": 4,
    "model_preparation": 4,
    "zero": 4,
    "checkpoint": 5,
    "doctor": 5,
    "commands": 6,
    "divergence": 6,
    "__init__": 7,
    "cli": 7,
}
# Statistics are laid out by the layout; the doctor writes as checkpoints do; floor 3 is a stack.
SEEN = {("consensus", "algorithms"), ("statistics", "sharding"), ("doctor", "checkpoint")}
SEEN |= {("noise", room) for room in ("devices", "names", "segment")}
SEEN |= {("formats", "algorithms")}  # formats are written in the operations of algorithms
SEEN |= {
    ("loading", "state"),
    ("loading", "param_groups"),
    ("foreign_state", "state"),
    ("foreign_state", "param_groups"),
    ("param_index", "param_groups"),
    ("layouts", "param_index"),
    ("compensation", "state"),
    ("param_groups", "coefficients"),
    ("functional", "coefficients"),
}
SEEN |= {("stateful", room) for room in ("compensation", "foreign_state", "loading", "options", "param_groups", "param_index", "state")}
SEEN |= {("batches", room) for room in ("coefficients", "param_groups", "state", "stateful")}
SEEN |= {("engine", room) for room in ("batches", "coefficients", "layouts", "metrics", "options", "param_groups", "state", "stateful")}
SEEN |= {("optimizers", room) for room in ("engine", "functional", "options")}


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


def test_the_range_of_deepspeed_is_the_one_that_attach_checks() -> None:
    pyproject = (PACKAGE.parent / "pyproject.toml").read_text()
    assert f'"deepspeed{sharded_optim.deepspeed.VERSIONS}; ' in pyproject


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ["deepspeed", "triton", "numba", "mpi4py", "matplotlib", "pydantic", "rich", "safetensors", "typer", "torch.distributed.tensor"]
    code = (
        f"import torch, sys; before = set(sys.modules); import sharded_optim; print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("algorithm", [ADAM, AMSGRAD, STABLE_ADAMW, SGD, MOMENTUM], ids=lambda algorithm: algorithm.name)
def test_an_algorithm_takes_as_many_coefficients_as_are_computed(algorithm: Algorithm) -> None:
    count = len(algorithm.coefficients(GROUP, 1, 1.0))
    assert len(inspect.signature(algorithm.update).parameters) == 2 + len(algorithm.state) + count
    if algorithm.statistic is not None:
        observe = len(inspect.signature(algorithm.statistic.observe).parameters)
        assert observe == 1 + len(algorithm.state) + len(algorithm.statistic.coefficients(GROUP, 1))


def test_operations_are_rounded_once() -> None:
    """Against NumPy, which uses the processor's instructions: torch.sqrt is wrong for 20 % of fp32 values on a CPU with MKL."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(100_000, generator=generator) * 10.0 ** torch.randint(-30, 30, (100_000,), generator=generator)
    others = torch.rand(100_000, generator=generator) + 1e-3
    assert torch.equal(operations.sqrt(values), torch.from_numpy(np.sqrt(values.numpy())))
    assert torch.equal(operations.divide(values, others), torch.from_numpy(values.numpy() / others.numpy()))
    scalars = torch.rand(1000, dtype=torch.float64, generator=generator)
    assert torch.equal(sqrt(scalars), torch.from_numpy(np.sqrt(scalars.numpy())))
    special = torch.tensor([0.0, torch.inf, torch.nan, 1e-45])
    assert torch.equal(operations.sqrt(special).nan_to_num(7.0), torch.from_numpy(np.sqrt(special.numpy())).nan_to_num(7.0))


@pytest.mark.parametrize("algorithm", [ADAM, AMSGRAD, STABLE_ADAMW, SGD, MOMENTUM], ids=lambda algorithm: algorithm.name)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_undo_gives_back_the_parameter_before_an_update(algorithm: Algorithm, form: str, nesterov: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    param, grad, *state = (torch.rand(50, generator=generator, dtype=torch.float64) for _ in range(2 + len(algorithm.state)))
    row = [
        torch.tensor(float(c), dtype=torch.float64)
        for c in algorithm.coefficients(GROUP | {"decay_form": form, "nesterov": nesterov}, 3, 0.7)
    ]
    after, *new_state = algorithm.update(param, grad, *state, *row)
    assert not torch.allclose(after, param)
    torch.testing.assert_close(algorithm.undo(after, grad, *new_state, *row), param)
