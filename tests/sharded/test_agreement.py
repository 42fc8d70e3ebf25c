"""One collective per step, and a step that happens on every rank or on none."""

from __future__ import annotations

import copy
from datetime import timedelta

import pytest
import ranks
import torch
import torch.distributed as dist
from collectives import collectives_of
from sharded_models import ShardedModel
from test_invariance import param_groups, spiky_grads, start_values
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import sharded_optim as so
from sharded_optim.sharding.ranks import own_process_group


def check_collectives(wrappers: list[str]) -> None:
    for wrapper in wrappers:
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
            assert collectives_of(optimizer.step) == expected, wrapper
            model.set_grads({})  # a rank without any gradient takes part all the same
            assert collectives_of(optimizer.step) == expected, wrapper


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


def check_nonfinite(wrappers: list[str]) -> None:
    last = dist.get_world_size() - 1
    for wrapper in wrappers:
        for make in (lambda g, policy: so.StableAdamW(g, lr=1e-2, nonfinite=policy), lambda g, policy: so.AdamW(g, 1e-2, nonfinite=policy)):
            for value in (float("nan"), float("inf"), -float("inf")):
                model = ShardedModel(wrapper, start_values(torch.float32))
                optimizer = make(param_groups(model.params), "skip")
                model.set_grads(spiky_grads(0, torch.float32))
                optimizer.step()
                before = snapshot(model, optimizer)
                spoil_one_element(model, value, last)
                optimizer.step()
                assert optimizer.skipped_steps == 1
                for old, new in zip(before, snapshot(model, optimizer), strict=True):
                    assert torch.equal(old, new)
                model.set_grads(spiky_grads(1, torch.float32))
                optimizer.step()
                assert optimizer.skipped_steps == 1
                assert {float(optimizer.state[p]["step"]) for n, p in model.params.items() if n != "down.bias"} == {2.0}

            model = ShardedModel(wrapper, start_values(torch.float32))
            optimizer = make(param_groups(model.params), "raise")
            model.set_grads(spiky_grads(0, torch.float32))
            optimizer.step()
            before = snapshot(model, optimizer)
            spoil_one_element(model, float("nan"), last)
            with pytest.raises(FloatingPointError, match=rf"rank {last}: gradient not finite.*'up.weight'"):
                optimizer.step()
            for old, new in zip(before, snapshot(model, optimizer), strict=True):
                assert torch.equal(old, new)

        model = ShardedModel(wrapper, start_values(torch.float32))
        optimizer = so.StableAdamW(param_groups(model.params), lr=1e-2, nonfinite="allow")
        model.set_grads(spiky_grads(0, torch.float32))
        spoil_one_element(model, float("nan"), last)
        optimizer.step()
        assert optimizer.skipped_steps == 0
        assert optimizer.metrics()["rms/up.weight"] != optimizer.metrics()["rms/up.weight"], "NaN"
        holds_the_piece = wrapper != "ddp" or dist.get_rank() == last
        assert model.local(model.params["up.weight"]).isnan().all() or not holds_the_piece
        assert model.local(model.params["vector"]).isfinite().all()


def check_agreement(wrappers: list[str]) -> None:
    check_collectives(wrappers)
    check_nonfinite(wrappers)


@pytest.mark.parametrize(("world_size", "wrappers"), [(2, ["ddp", "fsdp2"]), (4, ["hsdp", "fsdp2_tp"])])
def test_a_step_is_one_all_reduce_and_happens_on_every_rank_or_on_none(world_size: int, wrappers: list[str]) -> None:
    """One for StableAdamW, none for AdamW. After a non-finite gradient on one rank: bitwise untouched state and step counters, an error
    that names rank and tensor, or the whole tensor NaN as if unsharded.
    """
    ranks.run(check_agreement, world_size, wrappers)


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


def check_different_tensors_per_rank() -> None:
    """Pipeline stages: each rank owns other tensors; metrics cover the whole model."""
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


def check_copies_forget_their_process_group() -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    group = dist.new_group([0, 1])
    copied = copy.deepcopy(so.StableAdamW([param], lr=1e-2, process_group=group))
    with pytest.raises(ValueError, match="cannot take its process_group along; set it again"):
        copied.step()
    copied.process_group = group
    copied.param_groups[0]["params"][0].grad = torch.ones(3)
    copied.step()


def check_grad_scaler_found_inf_is_shared() -> None:
    """GradScaler finds an infinite gradient on its own rank only; with an agreement no rank steps."""
    param = nn.Parameter(torch.ones(3))
    optimizer = so.StableAdamW([param], lr=1e-2, nonfinite="allow")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((param * (torch.inf if dist.get_rank() == 1 else 1.0)).sum()).backward()
    scaler.step(optimizer)
    assert optimizer.skipped_steps == 1
    assert torch.equal(param.detach(), torch.ones(3))


def check_own_process_group() -> None:
    """Collectives of the optimizer and of a wrapper on the same ranks do not interleave, and both notice a missing rank in time."""
    parent = dist.new_group([0, 1], timeout=timedelta(seconds=17))
    own = own_process_group(parent)
    assert own is not None
    assert own is not parent
    assert own is own_process_group(parent)
    assert dist.get_process_group_ranks(own) == [0, 1]
    assert own._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=17)


def check_setting_the_process_group_rebuilds_the_layout() -> None:
    """From alone to together: what was no replica becomes one."""
    param = nn.Parameter(torch.ones(3))
    alone = dist.new_subgroups(1)[0]
    optimizer = so.StableAdamW([("w", param)], lr=1e-2, process_group=alone)
    param.grad = torch.full((3,), float(dist.get_rank()))
    optimizer.step()
    optimizer.process_group = None
    with pytest.raises(ValueError, match="both hold 'w'"):
        optimizer.step()


def check_all_of_the_above() -> None:
    check_different_tensors_per_rank()
    check_copies_forget_their_process_group()
    check_grad_scaler_found_inf_is_shared()
    check_own_process_group()
    check_setting_the_process_group_rebuilds_the_layout()


def test_ranks_with_different_tensors_copies_and_grad_scaler() -> None:
    """Stages of a pipeline step as if alone and report the whole model; copies ask for their group; found_inf is shared."""
    ranks.run(check_all_of_the_above, 2)
