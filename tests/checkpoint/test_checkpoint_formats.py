"""bfloat16 parameters with Kahan compensations continue with float32 masters, which start as parameter + compensation, exactly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn

import sharded_optim as so
from benchmarks.given_gradients import Model, Shapes, gradients
from sharded_optim import checkpoint

LAYERS: Shapes = (((33, 17), (33,)), ((9, 4),), ((1,),), ((),), ((129, 65),))
SAVED, LAST = 5, 8  # steps
OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "backend": "eager"}
Values = dict[str, Tensor]


def kahan(model: nn.Module) -> so.StableAdamW:
    return so.StableAdamW(model.named_parameters(), **OPTIONS)


def train(model: nn.Module, optimizer: Any, first: int, last: int, *, of_rank: bool = False) -> None:
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if of_rank else (0, 1)
    for step in range(first, last + 1):
        for param, grad in zip(model.parameters(), gradients(step, LAYERS, rank=rank, world_size=world_size), strict=True):
            param.grad = grad.bfloat16().to(param.dtype)
        optimizer.step()
        optimizer.zero_grad()


def trained(steps: int = SAVED) -> tuple[Model, so.StableAdamW]:
    model = Model(LAYERS).bfloat16()
    optimizer = kahan(model)
    train(model, optimizer, 1, steps)
    return model, optimizer


def values_of(model: nn.Module, optimizer: Any) -> Values:
    """What the parameters and their compensations are together."""
    found = {name: param.detach().float() + optimizer.state[param]["kahan_comp"].float() for name, param in model.named_parameters()}
    assert any(bool((found[name] != param).any()) for name, param in model.named_parameters())
    return found


def continued(values: Values, optimizer: so.StableAdamW) -> tuple[Model, so.StableAdamW]:
    """In float32 in one process: the same state, and these values."""
    model = Model(LAYERS)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(values[name])
    other = kahan(model)
    state = copy.deepcopy(optimizer.state_dict())
    for each in state["state"].values():
        each.pop("kahan_comp")
    other.load_state_dict(state)
    return model, other


def test_bfloat16_parameters_are_loaded_as_they_were(tmp_path: Path) -> None:
    """Compensations are not added to what is rounded again."""
    model, optimizer = trained()
    checkpoint.save(tmp_path, SAVED, model=model, optimizer=optimizer)
    loaded = Model(LAYERS, seed=1).bfloat16()
    its_optimizer = kahan(loaded)
    checkpoint.load(tmp_path, model=loaded, optimizer=its_optimizer)
    alone = Model(LAYERS, seed=1).bfloat16()
    checkpoint.load(tmp_path, model=alone)
    for (name, param), mine, other in zip(model.named_parameters(), loaded.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, param), name
        assert torch.equal(other, param), name
        assert torch.equal(its_optimizer.state[mine]["kahan_comp"], optimizer.state[param]["kahan_comp"]), name


# ---------------------------------------------------------------------------------------------------------------------- masters


def sharded(model: nn.Module, **options: Any) -> so.ShardedOptimizer:
    return so.ShardedOptimizer(model, so.StableAdamW, **OPTIONS, **options)


def masters_of(model: nn.Module, optimizer: so.ShardedOptimizer) -> Values:
    """Whole, of all ranks."""
    mine = {}
    for name, param in model.named_parameters():
        if param in optimizer.state:
            slot = optimizer._bucket_layout.slots[param]
            mine[name] = (slot.start, optimizer.state[param]["master"].clone())
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = {}
    for name, param in model.named_parameters():
        parts = sorted((each[name] for each in everyone if name in each), key=lambda part: part[0])
        found[name] = torch.cat([values.flatten() for _, values in parts]).view(param.shape)
    return found


def check_masters(folder: str) -> None:
    model, optimizer = trained()
    if dist.get_rank() == 0:
        alone = dist.new_group([0])
        checkpoint.save(folder, SAVED, model=model, optimizer=optimizer, process_group=alone)
    else:
        dist.new_group([0])
    dist.barrier()
    values = values_of(model, optimizer)
    for way in ("checkpoint", "whole", "loaded twice", "compensated shards"):
        loaded = Model(LAYERS, seed=1).bfloat16()
        its_optimizer = sharded(loaded)
        train(loaded, its_optimizer, 1, 2, of_rank=True)  # with masters of its own
        if way in ("checkpoint", "loaded twice"):
            for _ in range(1 + (way == "loaded twice")):
                checkpoint.load(folder, model=loaded, optimizer=its_optimizer)
        elif way == "whole":
            loaded.load_state_dict(model.state_dict())
            its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        else:
            compensated = Model(LAYERS, seed=2).bfloat16()
            saved = sharded(compensated, kahan_sum=True)
            checkpoint.load(folder, model=compensated, optimizer=saved)
            loaded.load_state_dict(compensated.state_dict())
            its_optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
        masters = masters_of(loaded, its_optimizer)
        for name, param in loaded.named_parameters():
            assert torch.equal(masters[name], values[name]), f"{way}: {name}"
            if way != "compensated shards":  # of which no rank knows those of the others
                assert torch.equal(param, values[name].bfloat16()), f"{way}: {name} is not its rounded master"
        expected, reference = continued(values, optimizer)
        train(expected, reference, SAVED + 1, LAST)
        train(loaded, its_optimizer, SAVED + 1, LAST)
        its_optimizer.wait()
        masters = masters_of(loaded, its_optimizer)
        for (name, param), other in zip(loaded.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(masters[name], other), f"{way}: {name}"
            assert torch.equal(param, other.bfloat16()), f"{way}: {name}"


@pytest.mark.parametrize("world_size", [1, 2])
def test_masters_start_as_parameter_plus_compensation(world_size: int, tmp_path: Path) -> None:
    """By a checkpoint on other ranks, by the state dict of one process, and by that of shards with compensations; bitwise."""
    ranks.run(check_masters, world_size, str(tmp_path))


def check_plain(folder: str) -> None:
    model = Model(LAYERS).bfloat16()
    optimizer = so.StableAdamW(model.named_parameters(), stochastic_rounding=True, **OPTIONS)
    train(model, optimizer, 1, 2)
    checkpoint.save(folder, 2, model=model, optimizer=optimizer)
    loaded = Model(LAYERS, seed=1).bfloat16()
    its_optimizer = sharded(loaded)
    checkpoint.load(folder, model=loaded, optimizer=its_optimizer)
    masters = masters_of(loaded, its_optimizer)
    for name, param in model.named_parameters():
        assert torch.equal(masters[name], param.float()), name


def test_masters_start_as_parameters_without_compensation(tmp_path: Path) -> None:
    ranks.run(check_plain, 1, str(tmp_path))
