"""The house: imports point down, heavy packages stay out, and an algorithm's pieces fit together."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sharded_optim
from sharded_optim.formulas import Algorithm, operations
from sharded_optim.formulas.scalars import sqrt
from sharded_optim.formulas.weight_decay import FORMS
from sharded_optim.optimizers import OPTIMIZERS
from sharded_optim.optimizers.muon import APPLY, Muon
from sharded_optim.step.engine import Engine

PACKAGE = Path(sharded_optim.__file__).parent
ALGORITHMS = {each.name: (each, optimizer) for optimizer in OPTIMIZERS.values() for each in optimizer.algorithms.values()}
ALGORITHMS |= {APPLY.name: (APPLY, Muon)}
every_algorithm = pytest.mark.parametrize(("algorithm", "optimizer"), ALGORITHMS.values(), ids=ALGORITHMS)
MOST_ROOMS = 15  # folders and files at the root of the package
MOST_FLOORS = 9  # from a room that imports no other to the command line


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
    """No room, a file or folder at the package's root, imports one that imports it, whatever lies between."""
    imports: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        imports.setdefault(room, set()).update(name for name in imports_of(path) if name != room)
    assert len(imports) <= MOST_ROOMS, sorted(imports)
    floors = list(TopologicalSorter(imports).static_order())  # raises CycleError, which names the circle
    floor_of: dict[str, int] = {}
    for room in floors:
        floor_of[room] = 1 + max((floor_of[below] for below in imports.get(room, ())), default=0)
    assert max(floor_of.values()) <= MOST_FLOORS, sorted(floor_of.items(), key=lambda item: item[1])


def test_nothing_in_the_package_imports_the_launcher_or_tests() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            assert not any(name.split(".")[0] in ("launch", "tests", "benchmarks", "examples") for name in names), path


def test_the_range_of_deepspeed_is_the_one_that_attach_checks() -> None:
    pyproject = (PACKAGE.parent / "pyproject.toml").read_text()
    assert f'"deepspeed{sharded_optim.deepspeed.VERSIONS}; ' in pyproject


def test_no_text_tells_to_install_a_distribution_that_is_in_no_index() -> None:
    """Whoever registered its name could put anything there."""
    root = PACKAGE.parent
    folders = ("sharded_optim", "launch", "benchmarks", "docs", "examples", "tests", "docker", "configs")
    files = [path for name in folders for path in (root / name).rglob("*") if path.suffix in (".py", ".md", ".sh", ".yaml", ".yml", "")]
    files = [path for path in [*files, *root.glob("*.md"), *root.glob("*.txt"), root / "Makefile"] if path.is_file()]
    found = [path for path in files if re.search(r"pip install[^\n]* '?sharded[-_]optim", path.read_text())]
    assert len(files) > 100
    assert found == []


def test_numpy_is_required() -> None:
    """torch does not require it, and its all_gather_object fails without it."""
    pyproject = (PACKAGE.parent / "pyproject.toml").read_text()
    (dependencies,) = re.findall(r"^dependencies = \[(.*?)^\]", pyproject, re.MULTILINE | re.DOTALL)
    assert '"numpy>=' in dependencies


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ["deepspeed", "triton", "llvmlite", "mpi4py", "matplotlib", "pydantic", "rich", "safetensors", "typer"]
    heavy += ["tensorboard", "wandb", "mlflow", "prometheus_client"]
    heavy += ["torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo"]
    code = (
        f"import torch, sys; before = set(sys.modules); import sharded_optim; print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


def group_of(optimizer: Callable[..., Engine]) -> dict[str, Any]:
    """Hyperparameters with which every term of an optimizer's math counts."""
    group = optimizer([torch.nn.Parameter(torch.ones(1, 1))], lr=1e-2).param_groups[0]
    return group | {"weight_decay": 0.1, "decay_form": "coupled", "reference_lr": 2e-2, "momentum": 0.9}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_hyperparameter_is_declared_and_documented(optimizer: type[Engine]) -> None:
    """All that groups have is declared, and what a constructor names is described there."""
    documented = re.findall(r"^    ((?:\w+, )*\w+):", inspect.getdoc(optimizer) or "", re.MULTILINE)
    names = {name for names in documented for name in names.split(", ")}
    declared = {each.name for each in optimizer.hyperparameters}
    assert group_of(optimizer).keys() - {"params", "momentum"} <= declared
    assert declared & inspect.signature(optimizer).parameters.keys() <= names


@every_algorithm
def test_an_algorithm_takes_as_many_coefficients_as_are_computed(algorithm: Algorithm, optimizer: type[Engine]) -> None:
    group = group_of(optimizer)
    count = len(algorithm.coefficients(group, 1, 1.0))
    assert len(inspect.signature(algorithm.update).parameters) == 2 + len(algorithm.state) + count
    if algorithm.statistic is not None:
        observe = len(inspect.signature(algorithm.statistic.observe).parameters)
        assert observe == 1 + len(algorithm.state) + len(algorithm.statistic.coefficients(group, 1))


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


@every_algorithm
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_undo_gives_back_the_parameter_before_an_update(algorithm: Algorithm, optimizer: type[Engine], form: str, nesterov: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    param, grad, *state = (torch.rand(50, generator=generator, dtype=torch.float64) for _ in range(2 + len(algorithm.state)))
    row = [
        torch.tensor(float(c), dtype=torch.float64)
        for c in algorithm.coefficients(group_of(optimizer) | {"decay_form": form, "nesterov": nesterov}, 3, 0.7)
    ]
    after, *new_state = algorithm.update(param, grad, *state, *row)
    assert not torch.allclose(after, param)
    if algorithm.undo is None:
        assert algorithm.matrix is not None or algorithm is APPLY, "only what an update by a whole matrix subtracted is lost"
        return
    torch.testing.assert_close(algorithm.undo(after, grad, *new_state, *row), param)
