"""One collective per step, and a step that happens on every rank or on none."""

from __future__ import annotations

import copy
import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from collectives import collectives_of
from sharded_models import ShardedModel
from test_invariance import param_groups, spiky_grads, start_values
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import sharded_optim as so
from sharded_optim.sharding.ranks import own_process_group

WRAPPERS = [("ddp", 2), ("fsdp2", 2), ("hsdp", 4), ("fsdp2_tp", 4)]
every_wrapper = pytest.mark.parametrize(("wrapper", "world_size"), WRAPPERS, ids=[wrapper for wrapper, _ in WRAPPERS])


@pytest.mark.ranks
@every_wrapper
def test_a_step_is_one_all_reduce_where_ranks_agree_and_no_collective_where_they_do_not(wrapper: str, world_size: int) -> None:
    for make, expected in (
        (lambda g: so.StableAdamW(g, lr=1e-2), ["gloo:all_reduce"]),
        (lambda g: so.AdamW(g, lr=1e-2, nonfinite="skip"), ["gloo:all_reduce"]),
        (lambda g: so.AdamW(g, lr=1e-2), []),
        (lambda g: so.DecoupledAdamW(g, lr=1e-2), []),
    ):
        model = ShardedModel(wrapper, start_values(torch.float32))
        optimizer = make(param_groups(model.params))
        model.set_grads(spiky_grads(0, torch.float32))
        if expected:
            optimizer.step()  # the first step also exchanges the layout
        assert collectives_of(optimizer.step) == expected
        model.set_grads({})  # a rank without any gradient takes part all the same
        assert collectives_of(optimizer.step) == expected


def snapshot(model: ShardedModel, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Clones of all local parameters and state."""
    params = [model.local(param).clone() for param in model.params.values()]
    return params + [model.local(v).clone() for p in model.params.values() for v in optimizer.state[p].values()]


def spoil_one_element(model: ShardedModel, value: float, on_rank: int) -> None:
    """Write `value` into one element of this rank's gradient of a matrix, on one rank only."""
    param = model.params["up.weight"]
    if dist.get_rank() == on_rank:
        local = param.grad._local_tensor if isinstance(param.grad, DTensor) else param.grad
        local.view(-1)[3] = value


@pytest.mark.ranks
@every_wrapper
@pytest.mark.parametrize("cls", [so.StableAdamW, so.AdamW])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_on_one_rank_skips_the_step_on_all(wrapper: str, world_size: int, cls: type, value: float) -> None:
    """State and step counters are untouched, bit for bit, and the next step is as any other."""
    model = ShardedModel(wrapper, start_values(torch.float32))
    optimizer = cls(param_groups(model.params), lr=1e-2, nonfinite="skip")
    model.set_grads(spiky_grads(0, torch.float32))
    optimizer.step()
    before = snapshot(model, optimizer)
    spoil_one_element(model, value, world_size - 1)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for old, new in zip(before, snapshot(model, optimizer), strict=True):
        assert torch.equal(old, new)
    model.set_grads(spiky_grads(1, torch.float32))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert {float(optimizer.state[p]["step"]) for n, p in model.params.items() if n != "down.bias"} == {2.0}


@pytest.mark.ranks
@every_wrapper
@pytest.mark.parametrize("cls", [so.StableAdamW, so.AdamW])
def test_a_non_finite_gradient_on_one_rank_raises_on_all_and_names_rank_and_tensor(wrapper: str, world_size: int, cls: type) -> None:
    model = ShardedModel(wrapper, start_values(torch.float32))
    optimizer = cls(param_groups(model.params), lr=1e-2, nonfinite="raise")
    model.set_grads(spiky_grads(0, torch.float32))
    optimizer.step()
    before = snapshot(model, optimizer)
    spoil_one_element(model, math.nan, world_size - 1)
    with pytest.raises(FloatingPointError, match=rf"rank {world_size - 1}: gradient not finite.*'up.weight'"):
        optimizer.step()
    for old, new in zip(before, snapshot(model, optimizer), strict=True):
        assert torch.equal(old, new)


@pytest.mark.ranks
@every_wrapper
def test_a_non_finite_gradient_that_is_allowed_makes_the_whole_tensor_nan(wrapper: str, world_size: int) -> None:
    """As if it was not sharded."""
    last = world_size - 1
    model = ShardedModel(wrapper, start_values(torch.float32))
    optimizer = so.StableAdamW(param_groups(model.params), lr=1e-2, nonfinite="allow")
    model.set_grads(spiky_grads(0, torch.float32))
    spoil_one_element(model, math.nan, last)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert math.isnan(optimizer.metrics()["rms/up.weight"])
    holds_the_piece = wrapper != "ddp" or dist.get_rank() == last
    assert model.local(model.params["up.weight"]).isnan().all() or not holds_the_piece
    assert model.local(model.params["vector"]).isfinite().all()


@pytest.mark.parametrize("cls", [so.AdamW, so.StableAdamW])
def test_a_square_that_overflows_is_not_finite(cls: type) -> None:
    """1e30 is finite but its square is not: going on would store an infinite second moment for good."""
    param = nn.Parameter(torch.ones(4))
    optimizer = cls([param], lr=1e-2, nonfinite="skip")
    param.grad = torch.tensor([1.0, 1e30, 1.0, 1.0])
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(param.detach(), torch.ones(4))


def test_adamw_lets_non_finite_gradients_through_by_default_as_torch_does() -> None:
    param = nn.Parameter(torch.ones(2))
    optimizer = so.AdamW([param], lr=1e-2)
    param.grad = torch.tensor([1.0, float("nan")])
    optimizer.step()
    assert param[0].isfinite()
    assert param[1].isnan()


@pytest.mark.ranks(2)
def test_ranks_with_different_tensors_step_as_if_alone_and_report_the_whole_model() -> None:
    """As stages of a pipeline do."""
    rank = dist.get_rank()
    shapes = {"stage0.weight": (4, 3), "stage0.bias": (5,)} if rank == 0 else {"stage1.weight": (2, 7)}
    params = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    optimizer = so.StableAdamW(list(params.items()), lr=1e-2)
    alone = {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}
    own_group = [dist.new_group([r], use_local_synchronization=False) for r in range(dist.get_world_size())][rank]
    reference = so.StableAdamW(list(alone.items()), lr=1e-2, process_group=own_group)
    for step in range(4):
        for name, param in params.items():
            generator = torch.Generator().manual_seed(step)
            param.grad = torch.randn(param.shape, generator=generator) * 10**step
            alone[name].grad = param.grad
        if step == 2:
            params[name].grad = alone[name].grad = None
        optimizer.step()
        reference.step()
    assert {name for name in optimizer.metrics() if name.startswith("rms/")} == {
        "rms/stage0.weight",
        "rms/stage0.bias",
        "rms/stage1.weight",
    }
    for name in params:
        assert torch.equal(params[name], alone[name])
        assert optimizer.metrics()[f"rms/{name}"] == reference.metrics()[f"rms/{name}"]


@pytest.mark.ranks(2)
def test_copies_ask_for_their_process_group() -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    group = dist.new_group([0, 1])
    copied = copy.deepcopy(so.StableAdamW([param], lr=1e-2, process_group=group))
    with pytest.raises(ValueError, match="which drops its process_group; set it again"):
        copied.step()
    copied.process_group = group
    copied.param_groups[0]["params"][0].grad = torch.ones(3)
    copied.step()


@pytest.mark.ranks(2)
def test_an_infinite_gradient_that_grad_scaler_finds_on_one_rank_stops_all() -> None:
    """It looks for them on its own rank only."""
    param = nn.Parameter(torch.ones(3))
    optimizer = so.StableAdamW([param], lr=1e-2, nonfinite="allow")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((param * (torch.inf if dist.get_rank() == 1 else 1.0)).sum()).backward()
    scaler.step(optimizer)
    assert optimizer.skipped_steps == 1
    assert torch.equal(param.detach(), torch.ones(3))


@pytest.mark.ranks(2)
def test_an_optimizer_has_a_process_group_of_its_own_with_the_timeout_of_its_parent() -> None:
    """Collectives of the optimizer and of a wrapper on the same ranks do not interleave, and both notice a missing rank in time."""
    parent = dist.new_group([0, 1], timeout=timedelta(seconds=17))
    own = own_process_group(parent)
    assert own is not None
    assert own is not parent
    assert own is own_process_group(parent)
    assert dist.get_process_group_ranks(own) == [0, 1]
    assert own._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=17)


@pytest.mark.ranks(2)
def test_setting_the_process_group_rebuilds_the_layout() -> None:
    """From alone to together: what was no replica becomes one."""
    param = nn.Parameter(torch.ones(3))
    alone = dist.new_subgroups(1)[0]
    optimizer = so.StableAdamW([("w", param)], lr=1e-2, process_group=alone)
    param.grad = torch.full((3,), float(dist.get_rank()))
    optimizer.step()
    optimizer.process_group = None
    with pytest.raises(ValueError, match="both hold 'w'"):
        optimizer.step()
