"""Wrapped models on the GPU: a process that is alone, with NCCL's own collectives, and two that share the device.

What each wrapper steps has the bits of one process on a CPU, where nothing is wrapped and the eager backend steps: gradients are exactly
the same everywhere, and exactly what two ranks average, as both bring the same.
"""

from __future__ import annotations

import datetime
import gc
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from operand_cases import assert_same
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import sharded_optim as so
from gpu.device import BACKEND, DEVICE, REHEARSAL, TRANSPORT, synchronisation_is_an_error, synchronize
from sharded_optim.sharding.ranks import timeout_of
from sharded_optim.zero.transfers import ShardGroup

STEPS = 4
TIMEOUT = datetime.timedelta(seconds=60)
SHAPES = {"one": (1,), "few_rows": (1, 7), "vector": (11,), "small": (7, 3), "wide": (3, 40)}
WRAPPERS = ("fsdp2", "hsdp", "ddp", "zero1", "zero2")
OPTIMIZERS = {"StableAdamW": so.StableAdamW, "AdamW": partial(so.AdamW, nonfinite="skip")}
# What torch says where ranks that share a device, or tensors of a GPU, are more than the transport can do.
NOT_ABLE = re.compile(r"gloo|not support|unsupported|no backend type|duplicate gpu|died without", re.IGNORECASE)


class Exact(nn.Module):
    """Its gradients are what it is given, exactly, on any device: (p * g).sum() has the gradient 1 * g."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))

    def forward(self, grads: dict[str, Tensor]) -> Tensor:
        return torch.stack([(param * grads[name]).float().sum() for name, param in self.named_parameters()]).sum()


def gradients(step: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Halves of them are exact in every dtype, as what is averaged is halved."""
    generator = torch.Generator().manual_seed(100 + step)
    scale = 300.0 if step == 2 else 1.0  # StableAdamW then clips
    return {name: (torch.randn(shape, generator=generator) * scale).to(dtype).to(device) for name, shape in SHAPES.items()}


def wrapped(wrapper: str, dtype: torch.dtype, optimizer: Callable[..., Any]) -> tuple[nn.Module, Any, Exact]:
    """What is called, what steps it, and the model inside."""
    model = Exact(dtype).to(DEVICE)
    world_size = dist.get_world_size()
    if wrapper == "ddp":
        called = DistributedDataParallel(model, device_ids=None if REHEARSAL else [DEVICE.index])
        return called, optimizer(model.named_parameters()), model
    if wrapper in ("zero1", "zero2"):
        kind, options = (optimizer.func, optimizer.keywords) if isinstance(optimizer, partial) else (optimizer, {})
        sharded = so.ShardedOptimizer(model, kind, stage=int(wrapper[-1]), **options)
        return model, sharded, model
    fully_shard(model, mesh=mesh(replicas=None if wrapper == "fsdp2" else world_size))
    return model, optimizer(model.named_parameters()), model


def mesh(replicas: int | None) -> DeviceMesh:
    """All ranks: in a row, or so many replicas of shards of one rank each.

    Made from groups: of the backend gloo, init_device_mesh would make groups for GPUs of NCCL.
    """
    world = dist.group.WORLD
    assert world is not None
    if replicas is None:
        return DeviceMesh.from_group(world, DEVICE.type, mesh_dim_names=("shard",))
    alone = [dist.new_group([rank]) for rank in range(replicas)][dist.get_rank()]
    rows = [[rank] for rank in range(replicas)]
    return DeviceMesh.from_group([world, alone], DEVICE.type, mesh=rows, mesh_dim_names=("replicate", "shard"))


def whole(param: Tensor) -> Tensor:
    """On the CPU; a collective, of objects: DTensor's own would have gloo gather tensors of the GPU, which may end the process."""
    if not isinstance(param, DTensor):
        return param.detach().cpu()
    shards: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shards, param.to_local().detach().cpu())
    return torch.cat(shards[: param.device_mesh.shape[-1]])  # what follows is of further replicas


def reference(dtype: torch.dtype, optimizer: Callable[..., Any], steps: int, **options: Any) -> Exact:
    """One process on the CPU, without a wrapper."""
    model = Exact(dtype)
    stepped = optimizer(model.named_parameters(), lr=1e-2, backend="eager", **options)
    for step in range(steps):
        for name, grad in gradients(step, dtype, torch.device("cpu")).items():
            model.get_parameter(name).grad = grad
        stepped.step()
    return model


def train(called: nn.Module, optimizer: Any, dtype: torch.dtype, steps: range) -> None:
    for step in steps:
        called(gradients(step, dtype, DEVICE)).backward()
        optimizer.step()
        optimizer.zero_grad()


def check_wrapper(wrapper: str, dtype: torch.dtype, name: str) -> None:
    """Runs in a rank."""
    optimizer = partial(OPTIMIZERS[name], lr=1e-2, backend=BACKEND)
    options = dict(optimizer.keywords)
    called, stepped, model = wrapped(wrapper, dtype, partial(optimizer.func, **options))
    train(called, stepped, dtype, range(STEPS))
    getattr(stepped, "wait", lambda: None)()
    has_masters = wrapper.startswith("zero") and dtype != torch.float32
    expected = _reference_with_masters(dtype, OPTIMIZERS[name]) if has_masters else reference(dtype, OPTIMIZERS[name], STEPS)
    for (key, param), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert param.device.type == DEVICE.type
        assert_same(whole(param), other.detach(), f"{key} under {wrapper}")
    engine = getattr(stepped, "_engine", stepped)  # which a ShardedOptimizer has inside
    assert "backend: triton\n" in repr(engine), repr(engine)
    metrics = stepped.metrics()
    assert metrics["skipped_steps"] == 0
    assert (name == "StableAdamW") == ("rms/vector" in metrics)
    so.DivergenceCheck(stepped, model=called)()


def _reference_with_masters(dtype: torch.dtype, optimizer: Callable[..., Any]) -> Exact:
    """ShardedOptimizer steps float32 masters by float32 gradients."""
    model, rounded = Exact(dtype).float(), Exact(dtype)
    stepped = optimizer(model.named_parameters(), lr=1e-2, backend="eager")
    for step in range(STEPS):
        for name, grad in gradients(step, dtype, torch.device("cpu")).items():
            model.get_parameter(name).grad = grad.float()
        stepped.step()
    rounded.load_state_dict(model.state_dict())
    return rounded


# ----------------------------------------------------------------------------------------------------------------------- one rank


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process."""
    if not REHEARSAL:
        torch.cuda.set_device(DEVICE)
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    device_id = None if REHEARSAL else DEVICE
    dist.init_process_group(TRANSPORT, store=store, rank=0, world_size=1, timeout=TIMEOUT, device_id=device_id)
    yield
    gc.collect()  # wrapped models are cycles that hold process groups
    dist.destroy_process_group()


@pytest.fixture
def collectives(alone: None, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The library communicates although there is one rank, with groups of its own as among several.

    Returns:
        The backends of the groups that it has asked for.
    """
    asked: list[str | None] = []
    groups: dict[tuple[str | None, str], Any] = {}

    def own_process_group(process_group: Any, backend: str | None = None, *, purpose: str = "") -> Any:
        asked.append(backend)
        if (backend, purpose) not in groups:
            groups[backend, purpose] = dist.new_group([0], timeout_of(dist.group.WORLD), backend)
        return groups[backend, purpose]

    for name, module in list(sys.modules.items()):
        if name.startswith("sharded_optim.") and hasattr(module, "own_process_group"):
            monkeypatch.setattr(module, "own_process_group", own_process_group)
    initialize = ShardGroup.__init__

    def through_collectives(self: ShardGroup, *arguments: Any) -> None:
        initialize(self, *arguments)
        self.exchanges = False  # as on a GPU: gloo's ranks on a CPU send each other their shards instead

    monkeypatch.setattr(ShardGroup, "__init__", through_collectives)
    return asked


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_rank_alone_steps_as_one_process(wrapper: str, dtype: torch.dtype, name: str, alone: None) -> None:
    check_wrapper(wrapper, dtype, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_ranks_tell_each_other_goes_through_the_transport(wrapper: str, dtype: torch.dtype, collectives: list[str | None]) -> None:
    """Reduce-scatter, all-gather, all-reduce of int64 and float64, broadcast, objects: each of its collectives, on tensors of the GPU."""
    check_wrapper(wrapper, dtype, "StableAdamW")
    assert {None, "gloo"} <= set(collectives)  # steps, and what is compared on the CPU


@pytest.mark.parametrize("wrapper", ["zero1", "zero2"])
def test_a_sharded_optimizer_clips_and_skips(wrapper: str, collectives: list[str | None]) -> None:
    called, optimizer, model = wrapped(wrapper, torch.float32, partial(so.StableAdamW, lr=1e-2, backend=BACKEND))
    train(called, optimizer, torch.float32, range(2))
    called(gradients(2, torch.float32, DEVICE)).backward()
    norm = optimizer.clip_grad_norm_(1.0)
    expected = torch.cat([grad.double().flatten() for grad in gradients(2, torch.float32, torch.device("cpu")).values()]).norm()
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    optimizer.step()
    optimizer.wait()
    before = [param.detach().clone() for param in model.parameters()]
    spoiled = gradients(3, torch.float32, DEVICE)
    spoiled["wide"][0, 0] = torch.nan
    called(spoiled).backward()
    optimizer.step()
    optimizer.wait()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(param, value) for param, value in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("wrapper", ["fsdp2", "ddp", "zero2"])
def test_a_wrapped_step_waits_for_nothing(wrapper: str, collectives: list[str | None]) -> None:
    """Nor for what comes from other ranks: their collectives are on streams of their own."""
    called, optimizer, _ = wrapped(wrapper, torch.float32, partial(so.StableAdamW, lr=1e-2, backend=BACKEND))
    given = [gradients(step, torch.float32, DEVICE) for step in range(5)]
    for step, grads in enumerate(given):
        if step < 3:
            called(grads).backward()
            optimizer.step()
            optimizer.zero_grad()
            continue
        called(grads).backward()
        with synchronisation_is_an_error():
            optimizer.step()
    synchronize()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_checkpoint_of_a_wrapped_model_loads_and_goes_on(wrapper: str, collectives: list[str | None], tmp_path: Path) -> None:
    """Under the same wrapper on the GPU, and without one on the CPU."""
    kahan = {} if wrapper.startswith("zero") else {"kahan_sum": False}
    optimizer = partial(so.StableAdamW, lr=1e-2, backend=BACKEND, **kahan)
    called, stepped, model = wrapped(wrapper, torch.bfloat16, optimizer)
    train(called, stepped, torch.bfloat16, range(2))
    saving = so.checkpoint.async_save(tmp_path, 2, model=called, optimizer=stepped)
    train(called, stepped, torch.bfloat16, range(2, STEPS))
    saving.wait()
    other_called, other, other_model = wrapped(wrapper, torch.bfloat16, optimizer)
    so.checkpoint.load(tmp_path, model=other_called, optimizer=other)
    train(other_called, other, torch.bfloat16, range(2, STEPS))
    for each in (stepped, other):
        getattr(each, "wait", lambda: None)()
    for (name, param), expected in zip(other_model.named_parameters(), model.parameters(), strict=True):
        assert_same(whole(param), whole(expected), name)


def test_torchs_own_checkpoint_functions_move_state(alone: None) -> None:
    called, optimizer, model = wrapped("fsdp2", torch.float32, partial(so.StableAdamW, lr=1e-2, backend=BACKEND))
    train(called, optimizer, torch.float32, range(2))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = get_optimizer_state_dict(called, optimizer, options=options)
    weights = {name: whole(param).clone() for name, param in model.named_parameters()}
    other_called, other, other_model = wrapped("fsdp2", torch.float32, partial(so.StableAdamW, lr=1e-2, backend=BACKEND))
    with torch.no_grad():
        for name, param in other_model.named_parameters():
            param.to_local().copy_(weights[name])
    set_optimizer_state_dict(other_called, other, saved, options=options)
    for each, own in ((called, optimizer), (other_called, other)):
        train(each, own, torch.float32, range(2, STEPS))
    expected = reference(torch.float32, so.StableAdamW, STEPS)
    for (name, param), (_, again), value in zip(
        model.named_parameters(), other_model.named_parameters(), expected.parameters(), strict=True
    ):
        assert_same(whole(param), value.detach(), name)
        assert_same(whole(again), value.detach(), name)


@pytest.mark.parametrize("wrapper", ["fsdp2", "ddp"])
def test_gradients_are_released_in_backward_of_a_wrapped_model(wrapper: str, alone: None) -> None:
    called, optimizer, model = wrapped(wrapper, torch.float32, partial(so.AdamW, lr=1e-2, backend=BACKEND, gradient_release=True))
    so.prepare_for_gradient_release(called, optimizer)
    train(called, optimizer, torch.float32, range(STEPS))
    for (name, param), value in zip(model.named_parameters(), reference(torch.float32, so.AdamW, STEPS).parameters(), strict=True):
        assert_same(whole(param), value.detach(), name)


# ----------------------------------------------------------------------------------------------------------------------- two ranks


def prepare_rank() -> None:
    if not REHEARSAL:
        torch.cuda.set_device(DEVICE)
        torch.ones(1, device=DEVICE)


def control(wrapper: str) -> None:
    """What the wrapper needs of the transport, without this library. Runs in a rank."""
    prepare_rank()
    if wrapper.startswith("zero"):
        rank, tensor = dist.get_rank(), torch.arange(8.0, device=DEVICE)
        dist.broadcast(tensor, group_src=0)
        shard = torch.empty(4, device=DEVICE)
        dist.reduce_scatter_tensor(shard, tensor, async_op=True).wait()
        assert torch.equal(shard.cpu(), 2 * torch.arange(8.0)[4 * rank : 4 * rank + 4])
        gathered = torch.empty(8, device=DEVICE)
        dist.all_gather_into_tensor(gathered, shard, async_op=True).wait()
        assert torch.equal(gathered.cpu(), 2 * torch.arange(8.0))
        for dtype, operation in ((torch.int32, "SUM"), (torch.int64, "SUM"), (torch.float64, "MAX")):
            counted = torch.full((3,), rank + 1, dtype=dtype, device=DEVICE)
            dist.all_reduce(counted, op=getattr(dist.ReduceOp, operation))
            assert counted.tolist() == [3 if operation == "SUM" else 2] * 3
        dist.all_gather_object([None, None], rank)
        return
    called, optimizer, _ = wrapped(wrapper, torch.float32, lambda named: torch.optim.AdamW([param for _, param in named], lr=1e-2))
    train(called, optimizer, torch.float32, range(2))
    synchronize()


def check_rank(wrapper: str, folder: str) -> None:
    """Runs in a rank."""
    prepare_rank()
    for dtype in (torch.float32, torch.bfloat16):
        for name in OPTIMIZERS:
            check_wrapper(wrapper, dtype, name)
    called, stepped, model = wrapped(wrapper, torch.float32, partial(so.StableAdamW, lr=1e-2, backend=BACKEND))
    train(called, stepped, torch.float32, range(2))
    so.checkpoint.async_save(folder, 2, model=called, optimizer=stepped).wait()
    train(called, stepped, torch.float32, range(2, STEPS))
    so.checkpoint.load(folder, model=called, optimizer=stepped)
    train(called, stepped, torch.float32, range(2, STEPS))
    getattr(stepped, "wait", lambda: None)()
    for (name, param), value in zip(model.named_parameters(), reference(torch.float32, so.StableAdamW, STEPS).parameters(), strict=True):
        assert_same(whole(param), value.detach(), name)


@cache
def obstacle(wrapper: str) -> str | None:
    """What of the transport keeps torch alone from running a wrapper on two ranks that share the device; None: nothing.

    Raises:
        AssertionError: something else went wrong.
    """
    try:
        ranks.run(control, 2, wrapper)
    except AssertionError as error:
        # Errors alone: the lines of a traceback name files and calls.
        said = [line for line in str(error).splitlines() if line and not line.startswith((" ", "---", "Traceback"))]
        found = [line for line in said if NOT_ABLE.search(line)]
        if not found:
            raise
        return found[0]
    return None


@pytest.mark.timeout(240)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_ranks_that_share_the_device_step_as_one_process(wrapper: str, tmp_path: Path) -> None:
    """Through gloo, as NCCL lets no two ranks share a device: 'Duplicate GPU detected'."""
    if (reason := obstacle(wrapper)) is not None:
        pytest.skip(f"torch alone does not run {wrapper} on two ranks that share a device, with gloo: {reason}")
    ranks.run(check_rank, 2, wrapper, str(tmp_path))


@pytest.mark.timeout(240)
def test_some_wrapper_runs_on_two_ranks_that_share_the_device() -> None:
    """Else the test before has proved nothing."""
    reasons = {}
    for wrapper in WRAPPERS:
        reasons[wrapper] = obstacle(wrapper)
        if reasons[wrapper] is None:
            return
    pytest.fail(f"torch alone runs none: {reasons}")
