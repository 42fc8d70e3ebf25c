"""An optimizer is one file: what its class declares of a hyperparameter is what the rest of the library knows. See `toy_optimizer.py`."""

from __future__ import annotations

import copy
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from toy_optimizer import ThresholdAdamW

import sharded_optim as so
from sharded_optim.checkpoint import MismatchError
from sharded_optim.formulas.hyperparameters import Choice, Float, Floats, Hyperparameter, Int, Switch
from sharded_optim.step.engine import Engine

ROOT = Path(__file__).parents[2]
LAYERS = ((7, 5), (5, 3))
WRONG: list[Any] = [math.nan, math.inf, 0.0, -1.0, "0.5", None, 1j, (0.5,), torch.tensor(math.nan), np.float32("nan"), torch.ones(2)]
RULE = r"threshold must be a finite number >= 0.001, got .* in "


def model_of(layers: tuple[tuple[int, int], ...] = LAYERS) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(*sizes) for sizes in layers))


def two_groups(model: nn.Module, first: Mapping[str, Any] = MappingProxyType({"threshold": 0.2})) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [{"params": named[::2], **first}, {"params": named[1::2], "lr": 5e-3}]


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        for index, param in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(10 * step + index)
            param.grad = torch.randn(param.shape, generator=generator) * 10.0 ** (step % 4)
        optimizer.step()


# ------------------------------------------------------------------------------------------------------------------------ math


def test_the_hyperparameter_decides_how_each_group_is_stepped() -> None:
    """With 1 it is StableAdamW, bit for bit; each group has its own."""

    def stepped(cls: Callable[..., Any], groups: Callable[..., Any] = lambda model: list(model.named_parameters()), **options: Any) -> Any:
        model = model_of()
        optimizer = cls(groups(model), lr=1e-2, **options)
        train(model, optimizer, range(4))
        return list(model.parameters())

    same, other, stable = stepped(ThresholdAdamW), stepped(ThresholdAdamW, threshold=0.2), stepped(so.StableAdamW)
    for a, b, c in zip(same, other, stable, strict=True):
        assert torch.equal(a, c)
        assert not torch.equal(a, b)
    whole = stepped(ThresholdAdamW, lambda model: [{"params": list(model.named_parameters())}], threshold=0.2)
    grouped = stepped(ThresholdAdamW, lambda model: [g | {"lr": 1e-2} for g in two_groups(model)])
    for index, (param, without, within) in enumerate(zip(grouped, same, whole, strict=True)):
        assert torch.equal(param, without if index % 2 else within)


# ---------------------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_it_is_checked_wherever_it_comes_from(wrong: Any) -> None:
    """The constructor, a group, a group that is added, what a scheduler or a user writes between steps, a state dict."""
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match=RULE + "the optimizer's arguments"):
        ThresholdAdamW([a], 1e-3, threshold=wrong)
    with pytest.raises(ValueError, match=RULE + r"param_groups\[0\]"):
        ThresholdAdamW([{"params": [a], "threshold": wrong}], 1e-3)
    optimizer = ThresholdAdamW([a], 1e-3)
    with pytest.raises(ValueError, match=RULE + r"param_groups\[1\]"):
        optimizer.add_param_group({"params": [b], "threshold": wrong})
    assert len(optimizer.param_groups) == 1
    saved = optimizer.state_dict()
    saved["param_groups"][0] = saved["param_groups"][0] | {"threshold": wrong}
    with pytest.raises(ValueError, match=RULE + r"the state dict's param_groups\[0\]"):
        optimizer.load_state_dict(saved)
    a.grad = torch.ones(4)
    for _ in range(2):  # after a first step, too, which has checked the group
        optimizer.param_groups[0]["threshold"] = wrong
        before = a.detach().clone()
        with pytest.raises(ValueError, match=RULE + r"param_groups\[0\]"):
            optimizer.step()
        assert torch.equal(a, before)
        optimizer.param_groups[0]["threshold"] = 1.0
        optimizer.step()


def test_a_group_that_has_not_changed_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """But whatever can change without being replaced is checked in every step."""
    checked: list[str] = []
    check = Hyperparameter.check
    monkeypatch.setattr(Hyperparameter, "check", lambda self, *args, **kwargs: checked.append(self.name) or check(self, *args, **kwargs))
    param = nn.Parameter(torch.ones(4))
    optimizer = ThresholdAdamW([param], 1e-3)
    group = optimizer.param_groups[0]
    scheduler = LambdaLR(optimizer, lambda step: 1.0 if step < 3 else 0.5)

    def step() -> list[str]:
        checked.clear()
        param.grad = torch.ones(4)
        optimizer.step()
        scheduler.step()
        return list(checked)

    assert "threshold" in step()
    assert step() != []  # the scheduler has written another float
    group["lr"] = 1e-3
    step()
    scheduler.step = lambda: None
    step()
    assert step() == []
    group["threshold"] = 0.5
    assert "threshold" in step()
    assert step() == []
    for name, value, spoil, words in (
        ("betas", [0.9, 0.99], lambda betas: betas.__setitem__(1, 2.0), "betas must be numbers in"),
        ("threshold", torch.tensor(0.5), lambda tensor: tensor.fill_(math.nan), "threshold must be a finite number"),
        ("lr", torch.tensor(1e-3), lambda tensor: tensor.fill_(math.inf), "lr must be a finite number"),
    ):
        kept, group[name] = group[name], value
        assert name in step()
        spoil(value)
        with pytest.raises(ValueError, match=words):
            step()
        group[name] = kept
        step()
    again = copy.deepcopy(optimizer)
    again.param_groups[0]["threshold"] = math.nan
    again.param_groups[0]["params"][0].grad = torch.ones(4)
    with pytest.raises(ValueError, match="threshold must be"):
        again.step()


KINDS: list[tuple[Hyperparameter, list[Any], list[Any], str]] = [
    (Float("x"), [0, 1.5, True, np.float32(2), torch.tensor(3.0)], [-1e-20, "1", math.nan, 10**400, [1.0], {}], "a finite number >= 0"),
    (Float("x", least=-math.inf), [-1e30, 0], [-math.inf, math.inf], "a finite number"),
    (Float("x", below=1.0), [0.0, 0.999], [1.0, -0.1], r"a number in \[0, 1\)"),
    (Floats("x"), [(0.5,), [0.1, 0.2, np.float64(0.3)], (torch.tensor(0.5),)], [(), 0.5, "0", (1.0,), (None,)], r"numbers in \[0, 1\)"),
    (Floats("x", below=9.0, count=2), [(8, 1)], [(8,), (1, 2, 3)], r"numbers in \[0, 9\), 2 of them"),
    (Switch("x"), [True, False, None, np.True_, 0, torch.tensor(True)], ["yes", 2, math.nan, [], torch.ones(2)], "True or False"),
    (Choice("x", ("a", "b")), ["a", np.str_("b")], ["c", None, ["a"], 0], "one of a, b"),
    (Int("x"), [-3, 2.0, np.int64(5), 2**70], [0.5, math.nan, math.inf, "1", None], "a whole number"),
    (Hyperparameter("x"), ["fast", 1.5, None, [1, (2.0, "b")], {"a": [1]}, np.ones(3)], [math.nan, 1j, {1}, [[math.inf]], len], "a finite"),
]


@pytest.mark.parametrize(("kind", "right", "wrong", "rule"), KINDS, ids=lambda each: repr(each) if isinstance(each, Hyperparameter) else "")
def test_each_kind_takes_what_its_rule_says(kind: Hyperparameter, right: list[Any], wrong: list[Any], rule: str) -> None:
    for value in right:
        kind.check(value, "here")
    for value in wrong:
        with pytest.raises(ValueError, match=rf"x must be {rule}.*, got .* in here"):
            kind.check(value, "here")
    if not isinstance(kind, Switch):
        with pytest.raises(ValueError, match="x must be on the host, got a tensor on meta in here: only lr may be on a device"):
            kind.check(torch.ones((), device="meta"), "here")


def test_a_default_that_is_not_declared_is_checked_as_any_value() -> None:
    class Careless(Engine):
        def __init__(self, params: Any, lr: float, mode: Any = "fast") -> None:
            defaults = {"lr": lr, "weight_decay": 0.0, "decay_form": "coupled", "betas": (0.9, 0.99), "eps": 1e-8, "mode": mode}
            super().__init__(params, defaults, algorithm=ThresholdAdamW.algorithms.__getitem__)

    param = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match=r"mode must be a finite number, a string, .*, got nan"):
        Careless([param], 1e-3, mode=math.nan)


# --------------------------------------------------------------------------------------------------------------- saved and loaded


def test_a_state_dict_without_it_keeps_the_groups_own_and_another_class_refuses_one_with_it() -> None:
    model = model_of()
    optimizer = ThresholdAdamW(two_groups(model), 1e-2, threshold=0.7)
    saved = copy.deepcopy(optimizer.state_dict())
    assert [group["threshold"] for group in saved["param_groups"]] == [0.2, 0.7]
    for group in optimizer.param_groups:
        group["threshold"] = 5.0
    old = copy.deepcopy(saved)
    for group in old["param_groups"]:
        del group["threshold"]
    optimizer.load_state_dict(old)
    assert [group["threshold"] for group in optimizer.param_groups] == [5.0, 5.0]
    optimizer.load_state_dict(saved)
    assert [group["threshold"] for group in optimizer.param_groups] == [0.2, 0.7]
    stable = so.StableAdamW(model.parameters(), lr=1e-2)
    whole = ThresholdAdamW(model.parameters(), 1e-2)
    with pytest.raises(ValueError, match=r"param_groups\[0\] has 'threshold', which this optimizer does not have"):
        stable.load_state_dict(whole.state_dict())
    whole.load_state_dict(stable.state_dict())
    whole.load_state_dict(torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.9)).state_dict())
    assert (whole.param_groups[0]["betas"], whole.param_groups[0]["threshold"]) == ((0.8, 0.9), 1.0)
    with pytest.raises(ValueError, match="amsgrad=True is not supported by StableAdamW"):
        whole.load_state_dict(torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True).state_dict())


def check_ranks(folder: str) -> None:
    rank = dist.get_rank()
    param = nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    with pytest.raises(ValueError, match=r"ranks disagree about '.*': (momentum|threshold) is .* on rank 0, .* on rank 1"):
        ThresholdAdamW([("w", param)], 1e-3, threshold=1.0 + rank).step()
    reference, model = model_of(), model_of()
    expected = ThresholdAdamW(two_groups(reference), 1e-2, process_group=dist.new_group([rank], use_local_synchronization=True))
    sharded = so.ShardedOptimizer(two_groups(model), ThresholdAdamW, lr=1e-2)
    for each, optimizer in ((reference, expected), (model, sharded)):
        train(each, optimizer, range(3))
    so.checkpoint.save(folder, 3, model=model, optimizer=sharded)
    train(reference, expected, range(3, 6))
    assert all(map(torch.equal, model_of().parameters(), model.parameters())) is False
    other = model_of()
    loaded = ThresholdAdamW(two_groups(other), 1e-2, threshold=9.0)
    loaded.param_groups[0]["threshold"] = 9.0
    so.checkpoint.load(folder, model=other, optimizer=loaded)
    assert [group["threshold"] for group in loaded.param_groups] == [0.2, 1.0]
    for each, optimizer in ((other, loaded), (model, sharded)):
        train(each, optimizer, range(3, 6))
        assert all(map(torch.equal, each.parameters(), reference.parameters()))
    third = model_of()
    with pytest.raises(MismatchError, match=r"param_groups\[0\] has no hyperparameter 'threshold', the checkpoint has 0.2"):
        so.checkpoint.load(folder, model=third, optimizer=so.StableAdamW(two_groups(third, {}), lr=1e-2))
    with pytest.raises(ValueError, match="rank 1: threshold must be a finite number"):
        so.ShardedOptimizer(model_of(), ThresholdAdamW, lr=1e-2, threshold=-1.0 if rank else 1.0)


def test_it_is_compared_between_ranks_and_sharded_and_saved(tmp_path: Path) -> None:
    """Sharded over 2 ranks it gives the bits of one process, and goes on from a checkpoint so."""
    ranks.run(check_ranks, 2, str(tmp_path))


# ------------------------------------------------------------------------------------------------------------------ one new file

EXPORTED = """
import json, sys
import torch
from torch import nn
import sharded_optim as so
from launch.config import OptimizerConfig
from launch.optimizer import build_optimizer
from sharded_optim import deepspeed
from sharded_optim.checkpoint import import_from
from sharded_optim.checkpoint.manifest import Parameters
from sharded_optim.tools.plan import Setup, plan
from sharded_optim.tools.shapes import from_shapes

folder = sys.argv[1]
assert OptimizerConfig(name="AdamW", lr=0.1, eps=1e-13).eps == 1e-13
config = OptimizerConfig(name="ThresholdAdamW", lr=0.1, threshold=0.5)
named = [("w", nn.Parameter(torch.ones(4, 3))), ("b", nn.Parameter(torch.ones(4)))]
optimizer = build_optimizer(named, config, {"w": 2, "b": 1})
assert type(optimizer) is so.ThresholdAdamW and optimizer.param_groups[0]["threshold"] == 0.5
refused = []
for name, given in (("ThresholdAdamW", {"threshold": 1e-4}), ("ThresholdAdamW", {"threshold": "x"}), ("AdamW", {"threshold": 0.5}),
                    ("ThresholdAdamW", {"eps": 1e-13}), ("AdamW", {"eps": "x"})):
    try:
        OptimizerConfig(name=name, lr=0.1, **given)
    except ValueError as error:
        refused.append(str(error))
assert deepspeed.is_own("ThresholdAdamW") and deepspeed.is_own("sharded_optim.ThresholdAdamW")
same = plan(from_shapes({"w": [1000]}), "zero2", Setup(optimizer="ThresholdAdamW", world_size=4))
assert same == plan(from_shapes({"w": [1000]}), "zero2", Setup(optimizer="StableAdamW", world_size=4))
try:
    Parameters(optimizer="ThresholdAdamW", groups=({"threshold": -1.0},), group_of={}, steps={})
except ValueError as error:
    refused.append(str(error))
named[0][1].grad = torch.ones(4, 3)
optimizer.step()
torch.save({"model": {name: torch.ones_like(param) for name, param in named}, "optimizer": optimizer.state_dict()}, folder + "/file")
try:
    import_from(folder + "/file", folder + "/run", 1, unpickle=True, optimizer="AdamW")
except ValueError as error:
    refused.append(str(error))
import_from(folder + "/file", folder + "/run", 1, unpickle=True, optimizer="ThresholdAdamW")
saved = so.checkpoint.describe(folder + "/run").parameters
assert (saved.optimizer, saved.groups[0]["threshold"]) == ("ThresholdAdamW", 0.5)
print(json.dumps(refused))
"""


def test_it_takes_one_new_file_and_its_export(tmp_path: Path) -> None:
    """Then the training job, DeepSpeed configs, plans, checkpoints and imports have it."""
    for name in ("sharded_optim", "launch"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests" / "toy_optimizer.py", tmp_path / "sharded_optim" / "optimizers" / "toy.py")
    registry = tmp_path / "sharded_optim" / "optimizers" / "__init__.py"
    exported = 'from sharded_optim.optimizers.toy import ThresholdAdamW\n\n__all__ = ["ThresholdAdamW", '
    registry.write_text(registry.read_text().replace("\n__all__ = [", exported))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", EXPORTED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for words in (
        "greater than or equal to 0.001",
        "valid number",
        "AdamW has no threshold; leave it out",
        "eps must be a finite number >= 1e-12, got 1e-13",
        "eps must be a finite number >= 0, got 'x'",
        "threshold must be a finite number >= 0.001, got -1.0 in param_groups[0]",
        "threshold=0.5, which AdamW does not support; choose the optimizer that continues it",
    ):
        assert words in result.stdout
