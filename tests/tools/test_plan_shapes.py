"""Names and shapes of models, from modules and files."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from sharded_optim.tools.shapes import from_module, load


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 3)
        self.head = nn.Linear(3, 11, bias=False)
        self.head.weight = self.embedding.weight


class Frozen(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 4)
        self.bias.requires_grad_(False)


class OnlyOnRealDevices(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 4)
        self.weight.sum().item()


def test_a_module_counts_shared_parameters_once_and_allocates_nothing() -> None:
    assert from_module("test_plan_shapes:Tied").shapes == {"embedding.weight": (11, 3)}
    assert from_module("test_plan_shapes:huge").numel == 2**40


def huge() -> nn.Module:
    return nn.Linear(2**20, 2**20, bias=False)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("test_plan_shapes:Frozen", "all trained, 'bias' is frozen"),
        ("test_plan_shapes:OnlyOnRealDevices", "failed on the meta device"),
        ("test_plan_shapes:load", r"test_plan_shapes:load\(\) failed on the meta device \(TypeError"),
        ("test_plan_shapes:Nowhere", "'test_plan_shapes:Nowhere' cannot be imported"),
        ("no.such.package:Model", "cannot be imported"),
        ("test_plan_shapes:dict", "cannot be imported"),
        ("test_plan_shapes:Path", "returned a PosixPath; give a callable that returns an nn.Module"),
    ],
)
def test_a_module_that_cannot_be_built_is_refused(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_module(target)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1, 2]", "holds a list; give"),
        ("{}", "a model needs parameters, got none"),
        ('{"w": 3}', "a shape is a list of sizes >= 0, got 3 for 'w'"),
        ('{"w": [3, -1]}', r"got \[3, -1\] for 'w'"),
        ('{"w": [2.5]}', r"got \[2.5\] for 'w'"),
        ('{"w": [true]}', r"got \[True\] for 'w'"),
    ],
)
def test_a_file_without_shapes_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load(str(path))
