"""Kahan compensations are of what the last step wrote: a write by others drops them, and nothing else does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from variants import CPU_BACKENDS

import sharded_optim as so

LOW = [torch.bfloat16, torch.float16]
WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {  # (parameter, mask)
    "mask": lambda param, mask: param.mul_(mask),
    "zeroed rows": lambda param, mask: param[1:].zero_(),
    "clamp": lambda param, mask: param.clamp_(-0.25, 0.25),
    "overwritten": lambda param, mask: param.copy_(torch.ones_like(param) / 3),
}


def trained(dtype: torch.dtype = torch.bfloat16, **options) -> tuple[nn.Linear, so.AdamW]:
    torch.manual_seed(0)
    model = nn.Linear(17, 9).to(dtype)
    optimizer = so.AdamW(model.named_parameters(), lr=1e-3, weight_decay=0.0, **options)
    train(model, optimizer, range(5))
    assert all(bool((state["kahan_comp"] != 0).any()) for state in optimizer.state.values())
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for index, param in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(10 * step + index)
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def step_without_moving(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """With zero gradients and moments: then a step writes what the parameter and its compensation add up to."""
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[param][key].zero_()
    optimizer.step()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("write", WRITES)
def test_what_others_write_stays_as_they_wrote_it(write: str, dtype: torch.dtype, backend: str) -> None:
    model, optimizer = trained(dtype, backend=backend)
    mask = torch.rand(9, 17, generator=torch.Generator().manual_seed(1)) < 0.5
    bias, compensation = model.bias.detach().clone(), optimizer.state[model.bias]["kahan_comp"].clone()
    with torch.no_grad():
        WRITES[write](model.weight, mask)
    written = model.weight.detach().clone()
    step_without_moving(model, optimizer)
    assert torch.equal(model.weight.detach(), written)
    assert not optimizer.state[model.weight]["kahan_comp"].any()
    assert torch.equal(model.bias.detach(), bias), "nobody has written to it"
    assert torch.equal(optimizer.state[model.bias]["kahan_comp"], compensation)


@pytest.mark.parametrize("options", [{}, {"stochastic_rounding": True, "kahan_sum": True}])
def test_a_loaded_model_is_stepped_as_by_an_optimizer_without_compensation(options: dict) -> None:
    model, optimizer = trained(**options)
    other, _ = trained()
    train(other, so.AdamW(other.parameters(), lr=0.1), range(2))
    model.load_state_dict(other.state_dict())
    twin, twins = copy.deepcopy((model, optimizer))
    for state in twins.state.values():
        state["kahan_comp"].zero_()
    train(model, optimizer, range(5, 8))
    train(twin, twins, range(5, 8))
    for param, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(param, expected)
        assert torch.equal(optimizer.state[param]["kahan_comp"], twins.state[expected]["kahan_comp"])


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_compensation_that_is_loaded_with_the_model_is_kept(model_first: bool, in_place: bool) -> None:
    """In either order, by a state dict or tensor by tensor."""
    model, optimizer = trained()
    straight, straights = copy.deepcopy((model, optimizer))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(20, 23))

    def load_optimizer() -> None:
        if not in_place:
            optimizer.load_state_dict(saved[1])
            return
        for param, values in zip(model.parameters(), saved[1]["state"].values(), strict=True):
            for key, value in values.items():
                optimizer.state[param][key].copy_(value)

    for load in (lambda: model.load_state_dict(saved[0]), load_optimizer)[:: 1 if model_first else -1]:
        load()
    train(model, optimizer, range(5, 8))
    train(straight, straights, range(5, 8))
    for param, expected in zip(model.parameters(), straight.parameters(), strict=True):
        assert torch.equal(param, expected)
        assert torch.equal(optimizer.state[param]["kahan_comp"], straights.state[expected]["kahan_comp"])


def test_a_model_loaded_alone_from_a_checkpoint_is_stepped_without_the_old_compensation(tmp_path: Path) -> None:
    model, optimizer = trained()
    so.checkpoint.save(tmp_path, 1, model=model, optimizer=optimizer)
    train(model, optimizer, range(20, 23))
    so.checkpoint.load(tmp_path, model=model)
    loaded = model.weight.detach().clone()
    step_without_moving(model, optimizer)
    assert torch.equal(model.weight.detach(), loaded)


def test_saved_state_has_no_compensation_of_values_that_are_gone(tmp_path: Path) -> None:
    """Whoever loads it would add it to them."""
    for saved_by in ("state_dict", "checkpoint"):
        model, optimizer = trained()
        with torch.no_grad():
            model.weight.zero_()
        if saved_by == "state_dict":
            compensation = optimizer.state_dict()["state"][0]["kahan_comp"]
        else:
            so.checkpoint.save(tmp_path, 1, model=model, optimizer=optimizer)
            compensation = optimizer.state[model.weight]["kahan_comp"]
        assert not compensation.any(), saved_by
        assert optimizer.state[model.bias]["kahan_comp"].any()


def test_steps_of_sets_and_of_all_do_not_take_each_other_for_others() -> None:
    model, optimizer = trained()
    twin, twins = copy.deepcopy((model, optimizer))
    for step in range(5, 9):
        for each, stepping in ((model, optimizer), (twin, twins)):
            for index, param in enumerate(each.parameters()):
                param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(10 * step + index)).bfloat16()
            if each is twin or step % 2:
                stepping.step()
            else:
                stepping.step(param=each.weight)
                stepping.step(param=each.bias)
    for param, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(param, expected)
        assert torch.equal(optimizer.state[param]["kahan_comp"], twins.state[expected]["kahan_comp"])


@pytest.mark.ranks(2)
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_wrappers_do_not_count_as_others(wrap: str) -> None:
    """Forward and backward passes leave compensations alone; a mask on a DTensor or its local tensor drops them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(17, 9), nn.GELU(), nn.Linear(9, 5)).bfloat16()
    if wrap == "ddp":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model)
    optimizer = so.StableAdamW(model.parameters(), lr=1e-3)
    for step in range(3):
        optimizer.zero_grad()
        inputs = torch.randn(6, 17, generator=torch.Generator().manual_seed(step)).bfloat16()
        model(inputs).float().square().mean().backward()
        before = [local(optimizer.state[param]["kahan_comp"]).clone() for param in model.parameters() if param in optimizer.state]
        optimizer.drop_stale_compensation()
        after = [local(optimizer.state[param]["kahan_comp"]) for param in model.parameters() if param in optimizer.state]
        assert all(map(torch.equal, before, after))
        optimizer.step()
    assert any(bool(local(state["kahan_comp"]).any()) for state in optimizer.state.values())
    weight = next(model.parameters())
    writes: list[Callable[[], object]] = [lambda weight=weight: local(weight).mul_(0.0)]
    if wrap == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        zeros = distribute_tensor(torch.zeros(weight.shape, dtype=weight.dtype), mesh, weight.placements)
        writes.append(lambda weight=weight, zeros=zeros: weight.mul_(zeros))
    for write in writes:
        optimizer.step()
        assert local(optimizer.state[weight]["kahan_comp"]).any()
        with torch.no_grad():
            write()
        optimizer.drop_stale_compensation()
        assert not local(optimizer.state[weight]["kahan_comp"]).any()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [1, 2])
def test_a_mask_drops_the_compensations_of_all_shards_and_a_step_none(stage: int) -> None:
    """With the bits of one process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(17, 9), nn.GELU(), nn.Linear(9, 5)).bfloat16()
    alone = copy.deepcopy(model)
    sharded = so.ShardedOptimizer(model, so.AdamW, stage=stage, lr=1e-3, weight_decay=0.0, kahan_sum=True, bucket_mb=1e-4)
    optimizer = so.AdamW(alone.named_parameters(), lr=1e-3, weight_decay=0.0)
    for masked in (False, True, False):
        if masked:
            with torch.no_grad():
                for param in (*model.parameters(), *alone.parameters()):
                    param.mul_(torch.rand(param.shape, generator=torch.Generator().manual_seed(1)) < 0.5)
        for step in range(3):
            for param, twin in zip(model.parameters(), alone.parameters(), strict=True):
                twin.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
                param.grad = twin.grad.clone()
            sharded.step()
            optimizer.step()
            sharded.wait()
            sharded.zero_grad()
        assert all(map(torch.equal, model.parameters(), alone.parameters())), masked
        assert any(bool(state["kahan_comp"].any()) for state in sharded.state.values())


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def test_masters_keep_what_a_write_to_other_elements_leaves_alone() -> None:
    """Of a parameter with float32 masters only the elements that were written lose theirs."""
    torch.manual_seed(0)
    model = nn.Linear(17, 9).bfloat16()
    optimizer = so.ShardedOptimizer(model, so.AdamW, lr=1e-3, weight_decay=0.0)
    for step in range(3):
        for index, param in enumerate(model.parameters()):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(10 * step + index)).bfloat16()
        optimizer.step()
    before = {param: optimizer.state[param]["master"].clone() for param in model.parameters()}
    assert any(bool((master != master.bfloat16().float()).any()) for master in before.values())
    with torch.no_grad():
        model.weight[2] = 0.0
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[param][key].zero_()
    optimizer.step()
    expected = before[model.weight].view(9, 17).clone()
    expected[2] = 0.0
    assert torch.equal(optimizer.state[model.weight]["master"].view(9, 17), expected)
    assert torch.equal(optimizer.state[model.bias]["master"], before[model.bias])
