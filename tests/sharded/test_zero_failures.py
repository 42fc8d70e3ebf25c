"""ShardedOptimizer when something is wrong: an error on every rank that names it, before anything hangs or goes apart."""

from __future__ import annotations

import gc
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed_models import AWKWARD
from test_zero import SMALL, STABLE, contributions, ranks_per_machine, sharded
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sharded_optim as so
from benchmarks.given_gradients import Model
from sharded_optim.step.param_set import ParamSet
from sharded_optim.storage import memory
from sharded_optim.zero import bucket_layout, transfers

pytestmark = pytest.mark.filterwarnings("ignore:weight_decay")

TIMEOUT = 1.5  # seconds of the process group
ADAMW = partial(so.AdamW, lr=1e-2)


class Raising(torch.autograd.Function):
    """The identity, whose backward fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise ArithmeticError("in backward")


def failing_loss(model: nn.Module, grads: list[Tensor]) -> Tensor:
    """Its backward completes some gradients, and then fails."""
    numbered = enumerate(zip(model.parameters(), grads, strict=True))
    terms = [(param if index > 4 else Raising.apply(param)) * grad for index, (param, grad) in numbered]
    early, late = terms[:5], terms[5:]
    return torch.stack([term.sum() for term in early]).sum() + torch.stack([term.sum() for term in late]).sum()


def act(way: str, model: nn.Module, optimizer: so.ShardedOptimizer, step: int) -> None:
    """A step, in which rank 1 does something else in step 2."""
    grads = contributions(step)
    differs = dist.get_rank() == 1 and step == 2
    if differs and way == "raises":
        failing_loss(model, grads).backward()
    elif differs and way == "raises, and goes on":
        with pytest.raises(ArithmeticError):
            failing_loss(model, grads).backward()
    else:
        model(grads).backward()
    if differs and way == "leaves out a step":
        optimizer.zero_grad()
        return
    if differs and way == "is late":
        time.sleep(2 * TIMEOUT)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("way", "make", "together"),
    [
        ("raises", STABLE, 2),
        ("raises", ADAMW, 1),
        ("raises, and goes on", STABLE, 2),
        ("leaves out a step", ADAMW, 2),
        ("leaves out a step", STABLE, 1),
        ("is late", ADAMW, 2),
    ],
)
def test_a_rank_that_goes_its_own_way_ends_the_job_on_all_ranks(way: str, make: partial, together: int) -> None:
    """Soon after the timeout, with an error that names a parameter on the rank that waits. Ranks share memory, or send."""
    process_group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    model = Model(AWKWARD)
    with ranks_per_machine(together):
        optimizer = sharded(make, model, process_group, bucket_mb=SMALL)
    names = [slot.name for bucket in optimizer._bucket_layout.buckets for slot in bucket.slots]
    errors: list[Exception] = []
    started = time.monotonic()
    for step in (1, 2, 3, 4):
        try:
            act(way, model, optimizer, step)
        except (RuntimeError, ArithmeticError) as error:
            errors.append(error)
            break
    assert errors, f"{way}: rank {dist.get_rank()} has noticed nothing"
    assert time.monotonic() - started < 5 * TIMEOUT, way
    if dist.get_rank() == 0 or way != "raises":
        assert any(repr(name) in str(errors[0]) for name in names), f"{way}: {errors[0]}"


def train_on(model: nn.Module, optimizer: so.ShardedOptimizer) -> None:
    optimizer.step()
    model(contributions(2)).backward()
    optimizer.finish_reduction()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("where", ["updating", "summing", "mapping"])
def test_what_this_process_cannot_do_is_not_said_to_be_missing_from_others(where: str) -> None:
    no_memory = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"

    def fails(*args: Any, **options: Any) -> Any:
        raise RuntimeError(no_memory)

    process_group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    model = Model(AWKWARD)
    optimizer = sharded(STABLE, model, process_group, bucket_mb=SMALL)
    model(contributions(1)).backward()
    optimizer.finish_reduction()
    with pytest.MonkeyPatch.context() as patch:
        if where == "updating":
            patch.setattr(optimizer._engine, "_update", fails)
        elif where == "summing":
            patch.setattr(transfers, "_sum", fails)
        else:
            patch.setattr(torch, "from_file", fails)
            optimizer._gatherer._shard_group.shared_memory._mapped.clear()
        with pytest.raises((RuntimeError, MemoryError)) as raised:
            train_on(model, optimizer)
    assert no_memory in str(raised.value), where
    assert "did not arrive from the other ranks" not in str(raised.value), where
    dist.barrier()


@pytest.mark.ranks(2)
def test_options_that_cannot_work_are_refused_by_name_on_all_ranks() -> None:
    rank = dist.get_rank()
    model = Model(AWKWARD)
    with pytest.raises(TypeError, match=r"optimizer_class must be a class of sharded_optim"):
        so.ShardedOptimizer(model, torch.optim.AdamW, lr=1e-2)
    for options, message in (
        ({"stage": 3}, r"all ranks: stage must be 1 or 2, got 3; .*fully_shard"),
        ({"bucket_mb": 0}, r"bucket_mb must be positive, got 0"),
        ({"reduce_dtype": torch.int32}, r"reduce_dtype must be a floating dtype"),
        ({"transport": "nccl"}, r"transport must be 'auto' or 'sends', got 'nccl'"),
        ({"gradient_release": True}, r"gradient_release=True cannot be given"),
        ({"lr": -1.0}, r"all ranks: lr must be a finite number >= 0, got -1.0"),
        ({"lr": -1.0 if rank else 1.0}, r"^rank 1: lr must be"),
        ({"stage": 1 + rank}, r"rank 1 has other parameters .* than rank 0"),
    ):
        with pytest.raises(ValueError, match=message):
            so.ShardedOptimizer(model, so.AdamW, **{"lr": 1e-2, **options})


@pytest.mark.ranks(2)
def test_parameters_that_cannot_be_sharded_are_refused_by_name_on_all_ranks() -> None:
    rank = dist.get_rank()
    model = Model(AWKWARD)
    twin = nn.Parameter(model.layers[0].weight.data)
    mesh = init_device_mesh("cpu", (2,))
    dtensors = nn.Linear(4, 4)
    fully_shard(dtensors, mesh=mesh)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    for params, message in (
        ([], r"all ranks: params has no parameters, in any group; give the parameters of a model"),
        ([{"params": []}, {"params": ()}], r"all ranks: params has no parameters, in any group; give"),
        (model.layers[0].weight, r"got one tensor of shape \(7, 3\)"),
        ([model.layers[0].weight, twin], r"'param_groups\[0\].params\[\d\]' and '.*' share memory; tie them as one parameter"),
        ([model.layers[0].weight] * 2, r"appears twice"),
        (dtensors, r"parameter 'weight' is a DTensor, not an ordinary tensor"),
        (nn.Linear(2, 2, device="meta"), r"parameter 'weight' has no memory \(device meta\)"),
        (nn.Linear(2 + rank, 2), r"rank 1 has other parameters"),
        (frozen, r"no parameter is trainable"),
        ([torch.ones(3, dtype=torch.int64)], r"no parameter is trainable"),
    ):
        with pytest.raises(ValueError, match=message):
            so.ShardedOptimizer(params, so.AdamW, lr=1e-2)


@pytest.mark.ranks(2)
def test_a_mesh_of_three_dimensions_is_refused() -> None:
    model = Model(AWKWARD)
    with pytest.raises(ValueError, match=r"must be a mesh .* of 1 dimension \(shards\) or 2 \(replicas, shards\)"):
        so.ShardedOptimizer(model, so.AdamW, init_device_mesh("cpu", (1, 2, 1)), lr=1e-2)


@pytest.mark.ranks(2)
def test_a_group_with_a_parameter_that_the_optimizer_has_is_refused() -> None:
    """Also a frozen one, which is in no bucket; the optimizer goes on."""
    model = Model(AWKWARD)
    optimizer = sharded(STABLE, model)
    with pytest.raises(ValueError, match=r"parameter 'layers.0.weight' appears twice"):
        optimizer.add_param_group({"params": model.layers[0].weight})
    added, part_frozen = nn.Parameter(torch.ones(3)), nn.Linear(2, 2)
    part_frozen.bias.requires_grad_(False)
    optimizer = sharded(STABLE, part_frozen)
    with pytest.raises(ValueError, match=r"parameter '.*' appears twice"):
        optimizer.add_param_group({"params": [part_frozen.bias, added]})
    part_frozen(torch.ones(1, 2)).sum().backward()
    optimizer.step()


@pytest.mark.ranks(2)
def test_optimizers_whose_backward_passes_come_in_different_orders_are_not_taken_for_each_other() -> None:
    models = [nn.Linear(3, 3) for _ in range(2)]
    optimizers = [sharded(ADAMW, model) for model in models]
    for index in (0, 1) if dist.get_rank() else (1, 0):
        models[index](torch.ones(1, 3)).sum().backward()
    with pytest.raises(RuntimeError, match=r"several ShardedOptimizers in different orders"):
        optimizers[0].step()
    dist.barrier()  # the other rank may still be in backward, for which it needs this rank's optimizers


@contextmanager
def failing(owner: Any, name: str, call: int) -> Iterator[list[int]]:
    """A function fails in one of its calls, on rank 1; yields how often it was called."""
    original, calls = getattr(owner, name), [0]

    def fails(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if dist.get_rank() == 1 and calls[0] == call:
            raise OSError(24, "Too many open files")
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, fails)
        yield calls


def layers() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(30, 30).to(dtype) for dtype in (torch.float32, torch.bfloat16))


def build() -> so.ShardedOptimizer:
    return sharded(STABLE, layers(), bucket_mb=SMALL)


def grow() -> so.ShardedOptimizer:
    optimizer = sharded(STABLE, layers().parameters())
    optimizer.add_param_group({"params": list(layers()[0].parameters())})
    return optimizer


def thaw() -> so.ShardedOptimizer:
    model = layers()
    model[1].requires_grad_(False)
    optimizer = sharded(STABLE, [param for layer in model for param in layer.parameters()])
    model[1].requires_grad_(True)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer


ALLOCATIONS = [(os, "memfd_create"), (mmap, "mmap"), (os, "pipe2"), (memory, "zeros_on"), (bucket_layout, "Bucket")]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("action", [build, grow, thaw])
def test_whatever_a_rank_cannot_allocate_all_ranks_raise_at_once(action: Callable[[], so.ShardedOptimizer]) -> None:
    """When an optimizer is built or grows; the next attempt is as the first, and no file stays open."""
    action()  # makes what the process keeps, as the optimizers' process group
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))
    for owner, name in [*ALLOCATIONS, (os, "open")] if action is build else ALLOCATIONS:
        call, raised = 0, 0
        while True:
            call += 1
            started = time.monotonic()
            with failing(owner, name, call) as calls:
                try:
                    optimizer = action()
                except (OSError, ValueError) as error:
                    raised += "Too many open files" in str(error)
                else:
                    del optimizer
            assert time.monotonic() - started < 10.0, "the other rank did not hear of it"
            gc.collect()
            most = torch.tensor(calls)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            if int(most) < call:
                break
        outcomes: list[Any] = [None, None]
        dist.all_gather_object(outcomes, (call, raised))
        assert outcomes[0] == outcomes[1], f"{name}: {outcomes}"
        assert raised or name == "open", name
    assert len(os.listdir("/proc/self/fd")) <= files + 2, "files stay open"


@pytest.mark.ranks(2)
def test_a_sparse_gradient_is_refused_in_backward() -> None:
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = sharded(STABLE, model)
    with pytest.raises(ValueError, match=r"the gradient of 'weight' is sparse .*sparse=False"):
        model(torch.tensor([1, 2])).sum().backward()
    del optimizer


def test_a_process_alone_blames_no_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    optimizer = sharded(ADAMW, model)
    model(torch.ones(1, 2)).sum().backward()

    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(ParamSet, "observe", fails)
    with pytest.raises(RuntimeError, match=r"^can't allocate memory$"):
        optimizer.step()
