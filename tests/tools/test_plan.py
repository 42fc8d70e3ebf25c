"""Plans: memory against what is allocated, communication against what is sent, and arithmetic."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from collectives import ranks_per_machine
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import sharded_optim as so
from sharded_optim.tools.plan import KINDS, OPTIMIZERS, SHARDINGS, Plan, Rates, Setup, compare, plan, time_of
from sharded_optim.tools.shapes import Model, from_module, from_shapes

# ------------------------------------------------------------------------------------------------- what is allocated and what is sent


class Blocks(nn.Module):
    """Blocks and a root, with sizes that no number of ranks divides, and fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 7)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 7)) for _ in range(3))
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(7, 13, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x * self.gain)


class WideBlocks(nn.Module):
    """Memory of its parameters is nearly all that a training step takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(257, 257) for _ in range(6))
        self.head = nn.Linear(257, 300)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
    """A step; its gradients stay."""
    optimizer.zero_grad()
    model(batch).float().square().mean().backward()
    optimizer.step()


def shapes_of(module: nn.Module) -> Model:
    return Model(shapes={name: tuple(param.shape) for name, param in module.named_parameters()})


def local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    """Of the memory in which these tensors of this rank lie, each allocation once."""
    storages = [local(tensor.detach()).untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def held(params: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes that this rank holds after a step, by kind, but for buckets and step counters."""
    params = list(params)
    states = [state for param in params for key, state in optimizer.state[param].items() if key not in ("step", "kahan_comp")]
    return {
        "parameters": bytes_of(params),
        "gradients": bytes_of(param.grad for param in params),
        "moments": bytes_of(states),
        "masters": bytes_of(optimizer.state[param].get("kahan_comp") for param in params),
    }


def assert_held(expected: Plan, held_here: dict[str, int]) -> None:
    """The plan tells what the rank that holds most does."""
    everywhere: list[dict[str, int]] = [held_here]
    if dist.is_initialized():
        everywhere = [{}] * dist.get_world_size()
        dist.all_gather_object(everywhere, held_here)
    for kind in held_here:
        assert max(each[kind] for each in everywhere) == getattr(expected.memory, kind), (expected.name, kind, everywhere)


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank's collectives are given, and from them what it sends, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.by_operation = dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce", "direct"), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            output, given, group = args[0], args[1], dist.ProcessGroup.unbox(args[2])
            gathers = name == "c10d::_allgather_base_"
            self.by_operation["all-gather" if gathers else "reduce-scatter"] += (given if gathers else output).nbytes * (group.size() - 1)
        elif name == "c10d::allreduce_":
            group = dist.ProcessGroup.unbox(args[1])
            self.by_operation["all-reduce"] += sum(-(-2 * (group.size() - 1) * tensor.nbytes // group.size()) for tensor in args[0])
        elif name == "c10d::send":
            self.by_operation["direct"] += sum(tensor.nbytes for tensor in args[0])
        elif name.startswith("c10d::") and name != "c10d::recv_":
            raise AssertionError(f"{name} is not counted")
        return func(*args, **(kwargs or {}))


def assert_sent(expected: Plan, sent: Sent) -> None:
    """Where ranks exchange shards directly, as ShardedOptimizer does on gloo, reduce-scatter and all-gather count together."""
    planned = dict.fromkeys(sent.by_operation, 0)
    for collective in expected.collectives:
        direct = sent.by_operation["direct"] and collective.operation != "all-reduce"
        planned["direct" if direct else collective.operation] += collective.sent
    assert planned == sent.by_operation, expected.name


class Peak(TorchDispatchMode):
    """The most bytes that tensors of operations under it, and those of `already`, take at one time."""

    def __init__(self, already: Iterable[Tensor]) -> None:
        super().__init__()
        self._storages = weakref.WeakValueDictionary()
        self.bytes = 0
        for tensor in already:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = local(tensor).untyped_storage()
        self._storages[storage._cdata] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor):
                self._add(tensor)
        self.bytes = max(self.bytes, covered((storage.data_ptr(), storage.nbytes()) for storage in self._storages.values()))
        return result


def covered(spans: Iterable[tuple[int, int]]) -> int:
    """How many bytes lie in any of these (address, size): a storage may be a part of another's memory."""
    total = end = 0
    for start, size in sorted(spans):
        total += max(0, start + size - max(start, end))
        end = max(end, start + size)
    return total


def test_one_process_holds_what_is_planned() -> None:
    for dtype, setup in (
        (torch.float32, Setup(optimizer="StableAdamW")),
        (torch.bfloat16, Setup(optimizer="StableAdamW", dtype="bf16", masters="kahan", state_dtype="bf16")),
    ):
        model = Blocks().to(dtype)
        optimizer = so.StableAdamW(model.parameters(), lr=1e-3, state_dtype=torch.bfloat16 if setup.state_dtype == "bf16" else None)
        train(model, optimizer, torch.arange(5))
        assert_held(plan(shapes_of(model), "none", setup), held(model.parameters(), optimizer))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "StableAdamW"])
def test_every_optimizer_holds_what_is_planned(name: str) -> None:
    options = {"+amsgrad": {"amsgrad": True}, "+momentum": {"momentum": 0.9}}
    cls, _, option = name.partition("+")
    model = Blocks()
    params = so.muon_param_groups(model, rest=option or "adamw") if cls == "Muon" else model.parameters()
    optimizer = getattr(so, cls)(params, lr=1e-3, **options.get(f"+{option}", {}))
    train(model, optimizer, torch.arange(5))
    assert_held(plan(shapes_of(model), "none", Setup(optimizer=name)), held(model.parameters(), optimizer))


def check_ddp(setup: Setup) -> None:
    model = Blocks()
    shapes, wrapped = shapes_of(model), DistributedDataParallel(model)
    buckets: list[int] = []

    def hook(group, bucket):  # torch compares annotations with its types, and these would be strings
        buckets.append(bucket.buffer().nbytes)
        work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0].div_(dist.get_world_size()))

    wrapped.register_comm_hook(dist.group.WORLD, hook)
    optimizer = so.StableAdamW(model.parameters(), lr=1e-3)
    for _ in range(2):  # in the second, DDP arranges its buckets anew
        train(wrapped, optimizer, torch.arange(5))
    buckets.clear()
    with Sent() as sent:
        train(wrapped, optimizer, torch.arange(5))
    expected = plan(shapes, "ddp", setup)
    assert_held(expected, held(model.parameters(), optimizer) | {"buckets": sum(buckets)})
    assert_sent(expected, sent)


MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def check_fully_shard(sharding: str, setup: Setup, dtype: torch.dtype = torch.float32, policy: MixedPrecisionPolicy | None = None) -> None:
    model = Blocks().to(dtype)
    shapes = shapes_of(model)
    replicas = dist.get_world_size() // (setup.shard_size or dist.get_world_size())
    mesh = init_device_mesh("cpu", (replicas, dist.get_world_size() // replicas), mesh_dim_names=("replicas", "shards"))
    mesh = mesh if setup.shard_size else mesh["shards"]
    options = {"mesh": mesh, "mp_policy": policy or MixedPrecisionPolicy()}
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    optimizer = so.StableAdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, torch.arange(5))
    with Sent() as sent:
        train(model, optimizer, torch.arange(5))
    expected = plan(shapes, sharding, setup)
    assert_held(expected, held(model.parameters(), optimizer))
    assert_sent(expected, sent)


def check_fully_shard_peak(setup: Setup, policy: MixedPrecisionPolicy | None = None) -> None:
    """The total is an upper bound of what is there at one time, and not a loose one."""
    model = WideBlocks()
    shapes = shapes_of(model)
    options = {"mp_policy": policy or MixedPrecisionPolicy()}
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    optimizer = so.StableAdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, torch.ones(1, 257))
    optimizer.zero_grad()
    with Peak([*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]) as peak:
        train(model, optimizer, torch.ones(1, 257))
    total = plan(shapes, "fsdp2", setup).memory.total
    assert 0.85 * total < peak.bytes < total  # measured: 0.92


def held_sharded(optimizer: so.ShardedOptimizer) -> dict[str, int]:
    """As `held`, of the buckets in which everything lies."""
    buckets = optimizer._bucket_layout.buckets
    local_states = optimizer._engine.state.values()
    return {
        "parameters": bytes_of(bucket.values for bucket in buckets),  # where each parameter has a storage of its own
        "gradients": bytes_of([bucket.grads for bucket in buckets] + [bucket.contents for bucket in buckets]),
        "moments": sum(bytes_of(value for key, value in state.items() if key not in ("step", "kahan_comp")) for state in local_states),
        "masters": sum(bytes_of([state.get("kahan_comp")]) for state in local_states) + bytes_of(bucket.masters for bucket in buckets),
    }


BUCKET_MB = 0.001  # a few tensors of `Blocks`


def check_sharded_optimizer(stage: int, setup: Setup, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    model = Blocks().to(dtype)
    shapes = shapes_of(model)
    mesh = None
    if setup.shard_size:
        mesh = init_device_mesh("cpu", (setup.world_size // setup.shard_size, setup.shard_size), mesh_dim_names=("replicas", "shards"))
    with ranks_per_machine(1):
        optimizer = so.ShardedOptimizer(model, so.StableAdamW, mesh, stage=stage, lr=1e-3, bucket_mb=BUCKET_MB, **options)
    train(model, optimizer, torch.arange(5))
    optimizer.zero_grad()
    with Sent() as sent:
        model(torch.arange(5)).float().square().mean().backward()
        optimizer.step()
        optimizer.wait()
    expected = plan(shapes, f"zero{stage}", replace(setup, bucket_bytes=int(BUCKET_MB * 2**20)))
    assert_held(expected, held_sharded(optimizer))
    assert_sent(expected, sent)


def check_sharded_optimizer_peak(stage: int, setup: Setup) -> None:
    """The total is an upper bound of what is there at one time, and not a loose one."""
    model = WideBlocks()
    shapes = shapes_of(model)
    with ranks_per_machine(1):
        optimizer = so.ShardedOptimizer(model, so.StableAdamW, stage=stage, lr=1e-3, bucket_mb=0.3)  # a block has 0.25
    train(model, optimizer, torch.ones(1, 257))
    optimizer.wait()
    optimizer.zero_grad()
    already = [*model.parameters(), *(value for state in optimizer._engine.state.values() for value in state.values())]
    already += [
        tensor
        for bucket in optimizer._bucket_layout.buckets
        for tensor in (bucket.values, bucket.grads, bucket.masters, bucket.contents)
        if tensor is not None
    ]
    with Peak(already) as peak:
        train(model, optimizer, torch.ones(1, 257))
    total = plan(shapes, f"zero{stage}", replace(setup, bucket_bytes=int(0.3 * 2**20))).memory.total
    assert 0.95 * total < peak.bytes < total  # measured: 0.99 for both stages


def step_of_muon(sharding: str, setup: Setup) -> tuple[Model, Any]:
    """A model of these shapes, and the optimizer inside of what has stepped it once."""
    model = Blocks()
    shapes = shapes_of(model)
    replicas = setup.world_size // (setup.shard_size or setup.world_size)
    mesh = init_device_mesh("cpu", (replicas, setup.world_size // replicas), mesh_dim_names=("replicas", "shards"))
    groups = so.muon_param_groups(model)
    if sharding == "zero2":
        outside = so.ShardedOptimizer(groups, so.Muon, mesh, lr=1e-3, bucket_mb=BUCKET_MB, module=model)
        train(model, outside, torch.arange(5))
        return shapes, outside.inside
    if sharding == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        for layer in model.layers:
            fully_shard(layer, mesh=mesh if replicas > 1 else mesh["shards"])
        wrapped = fully_shard(model, mesh=mesh if replicas > 1 else mesh["shards"])
        groups = so.muon_param_groups(model)
    optimizer = so.Muon(groups, lr=1e-3)
    train(wrapped, optimizer, torch.arange(5))
    return shapes, optimizer


def check_matrices(sharding: str, setup: Setup) -> None:
    """Bytes that all ranks send, flops of the busiest; and its memory is at most what is planned."""
    shapes, optimizer = step_of_muon(sharding, setup)
    (matrices,) = optimizer._sets.whole.layout.matrices
    (exchange,) = optimizer._sets.whole._exchanges.values()
    exchange.allocate()
    slots = [buffer for slot in exchange._slots for buffer in vars(slot).values()]
    sent = [sum(sum(getattr(each, way).sent) for each in matrices.rounds) for way in ("gather", "scatter")]
    here = {"sent": sent, "buffers": 2 * (exchange.buffer.numel() + sum(map(Tensor.numel, slots)))}
    everywhere: list[Any] = [None] * setup.world_size
    dist.all_gather_object(everywhere, here)
    setup = replace(setup, optimizer="Muon", bucket_bytes=int(BUCKET_MB * 2**20))
    planned, others = plan(shapes, sharding, setup), plan(shapes, sharding, replace(setup, optimizer="AdamW"))
    all_to_all = [each.sent for each in planned.collectives if each.operation == "all-to-all"]
    totals = [2 * sum(each["sent"][way] for each in everywhere) for way in (0, 1)]
    assert all_to_all == [total // setup.world_size for total in totals if total], sharding
    assert planned.matrix_flops == 5 * max(matrices.loads), sharding
    buffers = planned.memory.buckets - others.memory.buckets
    most = max(each["buffers"] for each in everywhere)
    assert most <= buffers <= 3 * most, (sharding, most, buffers)  # what a rank sends to itself is not left out: much on so few ranks


def check_two_ranks() -> None:
    setup = Setup(world_size=2, optimizer="StableAdamW", backend="gloo")
    for sharding in ("ddp", "fsdp2", "zero2"):
        check_matrices(sharding, setup)
    low = replace(setup, dtype="bf16")
    check_ddp(setup)
    check_fully_shard("fsdp2", setup)
    check_fully_shard("fsdp2", replace(low, masters="kahan"), torch.bfloat16)
    check_fully_shard("fsdp2", low, policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    check_fully_shard("fsdp2", replace(low, reduce_dtype="fp32"), policy=MIXED)
    check_fully_shard_peak(setup)
    check_fully_shard_peak(replace(low, reduce_dtype="fp32"), MIXED)
    check_sharded_optimizer(1, setup)
    check_sharded_optimizer(2, low, torch.bfloat16)
    check_sharded_optimizer(2, replace(low, masters="kahan"), torch.bfloat16, kahan_sum=True)
    for stage in (1, 2):
        check_sharded_optimizer_peak(stage, setup)


def test_two_ranks_hold_and_send_what_is_planned() -> None:
    ranks.run(check_two_ranks, 2)


def check_four_ranks() -> None:
    setup = Setup(world_size=4, shard_size=2, optimizer="StableAdamW", backend="gloo")
    check_fully_shard("hsdp", setup)
    check_fully_shard("hsdp", replace(setup, dtype="bf16", reduce_dtype="fp32"), policy=MIXED)
    check_sharded_optimizer(2, setup)
    check_matrices("hsdp", setup)
    check_matrices("zero2", setup)


def test_four_ranks_hold_and_send_what_is_planned_with_two_replicas() -> None:
    ranks.run(check_four_ranks, 4)


# ------------------------------------------------------------------------------------------------------------------------- arithmetic

GPT2 = from_module("benchmarks.gpt2:GPT2Model")


def llama(width: int, inner: int, layers: int, kv_width: int, vocabulary: int) -> Model:
    matrices = {"q": (width, width), "k": (kv_width, width), "v": (kv_width, width), "o": (width, width)}
    matrices |= {"gate": (inner, width), "up": (inner, width), "down": (width, inner), "norm": (width,), "norm2": (width,)}
    shapes = {f"layers.{layer}.{name}.weight": shape for layer in range(layers) for name, shape in matrices.items()}
    return Model(shapes={"embedding": (vocabulary, width), **shapes, "norm": (width,), "head": (vocabulary, width)})


LLAMA_70B = llama(8192, 28672, 80, 1024, 128256)
AWKWARD = from_shapes(
    {"scalar": [], "empty": [0, 3], "layers.0.prime": [13, 7], "layers.0.row": [1], "layers.1.one_column": [5, 1], "last": [31]}
)
every_sharding = pytest.mark.parametrize("sharding", SHARDINGS)


def setup_for(sharding: str, world_size: int, **options: Any) -> Setup:
    return Setup(world_size=world_size, shard_size=world_size if sharding == "hsdp" else None, **options)


@every_sharding
@pytest.mark.parametrize("options", [{}, {"dtype": "bf16"}, {"dtype": "bf16", "masters": "kahan"}, {"optimizer": "StableAdamW"}])
def test_one_rank_steps_everything_and_sends_nothing(sharding: str, options: dict[str, str]) -> None:
    alone, none = plan(AWKWARD, sharding, setup_for(sharding, 1, **options)), plan(AWKWARD, "none", Setup(**options))
    assert alone.sent == 0
    assert alone.memory.moments == none.memory.moments
    if sharding not in ("zero1", "zero2"):  # whose buckets have a pad, and whose averaged gradients have memory of their own
        kinds = ("parameters", "gradients", "masters")
        total = sum(getattr(none.memory, kind) for kind in kinds)
        if options.get("masters") == "kahan" or "dtype" not in options:
            assert [getattr(alone.memory, kind) for kind in kinds] == [getattr(none.memory, kind) for kind in kinds]
        elif sharding == "zero3":  # which keeps gradients in the dtype of the masters
            assert sum(getattr(alone.memory, kind) for kind in kinds) == total + 2 * AWKWARD.numel
        else:
            assert sum(getattr(alone.memory, kind) for kind in kinds) == total


@pytest.mark.parametrize("sharding", ["zero1", "zero2", "zero3", "fsdp2", "hsdp"])
def test_state_falls_as_one_over_the_ranks(sharding: str) -> None:
    """Where every dimension can be divided: the last factor of two as the first."""
    model = from_shapes({f"layers.{layer}.weight": [1024, 64] for layer in range(4)})
    moments = [plan(model, sharding, setup_for(sharding, 2**power)).memory.moments for power in range(9)]
    assert moments == [8 * model.numel >> power for power in range(9)]


def test_nothing_is_lost_or_held_twice_on_awkward_shapes() -> None:
    for ranks_ in (1, 2, 3, 7, 64, 1000):
        for each in compare(AWKWARD, Setup(world_size=ranks_, shard_size=1 if ranks_ % 2 else 2)):
            assert all(getattr(each.memory, kind) >= 0 for kind in KINDS)
            assert each.memory.moments * each.shards >= 8 * AWKWARD.numel
            assert each.memory.parameters * each.shards >= 4 * AWKWARD.numel


def test_stages_send_the_same_and_stage_three_half_as_much_again() -> None:
    model = GPT2
    by_name = {each.name: each for each in compare(model, Setup(world_size=64))}
    whole = 4 * model.numel
    assert by_name["ddp"].sent == math.ceil(2 * 63 / 64 * whole)
    assert by_name["zero1"].sent == by_name["zero2"].sent == pytest.approx(by_name["ddp"].sent, rel=1e-3)
    assert by_name["zero3"].sent == pytest.approx(3 * 63 / 64 * whole, rel=1e-3)
    assert by_name["zero2"].memory.total < by_name["zero1"].memory.total < by_name["ddp"].memory.total


def test_a_step_moves_the_bytes_that_benchmarks_count() -> None:
    model = from_shapes({"w": [1000]})
    stepped = {name: plan(model, "none", Setup(optimizer=name)).stepped / 1000 for name in OPTIMIZERS}
    assert stepped == {
        "Adam": 28,
        "AdamW": 28,
        "StableAdamW": 36,
        "DecoupledAdamW": 28,
        "DecoupledAdamW+amsgrad": 36,
        "DecoupledSGDW": 12,
        "DecoupledSGDW+momentum": 20,
        "Muon": 32,  # of AdamW, which checks gradients too
        "Muon+stable_adamw": 36,
    }
    matrix = from_shapes({"layers.0.w": [10, 100]})
    assert plan(matrix, "none", Setup(optimizer="Muon")).stepped / 1000 == 28
    low = Setup(optimizer="StableAdamW", dtype="bf16", masters="none")
    assert plan(model, "none", low).stepped / 1000 == 28
    assert plan(model, "none", replace(low, masters="kahan")).stepped / 1000 == 32
    assert (
        plan(model, "zero2", replace(low, optimizer="AdamW", masters="fp32")).stepped / 1000 == 30
    )  # as fp32, and the bf16 value is written


def test_memory_of_a_tensor_with_fewer_rows_than_ranks_stays_at_a_row() -> None:
    """FSDP2 cuts rows, the flat shardings elements."""
    model = from_shapes({"layers.0.weight": [4, 1024]})
    assert plan(model, "fsdp2", Setup(world_size=64)).memory.moments == 8 * 1024
    assert plan(model, "zero3", Setup(world_size=64)).memory.moments == 8 * 4 * 1024 // 64


def test_tens_of_thousands_of_ranks_take_no_longer_than_one() -> None:
    model = LLAMA_70B
    begin = time.perf_counter()
    plans = compare(model, Setup(world_size=65536, shard_size=512, dtype="bf16", optimizer="StableAdamW"))
    assert time.perf_counter() - begin < 1.0
    assert [each.name for each in plans[-3:]] == ["zero1 over 512", "zero2 over 512", "hsdp over 512"]
    zero = next(each for each in plans if each.name == "zero2")
    assert zero.memory.moments == pytest.approx(8 * model.numel / 65536, rel=1e-2)


def test_gloo_needs_room_for_what_is_received() -> None:
    nccl, gloo = (plan(GPT2, "zero1", Setup(world_size=4, bucket_bytes=2**20, backend=backend)) for backend in ("nccl", "gloo"))
    largest = [50257 * 768, 9 * 2**18, 9 * 2**18]  # elements of the three largest buckets: the embedding, and matrices of 768 x 3072
    assert gloo.memory.buckets - nccl.memory.buckets == pytest.approx(3 * sum(largest), rel=1e-5)


def test_time_is_what_the_rates_make_of_bytes() -> None:
    each = plan(from_shapes({"w": [10**6]}), "ddp", Setup(world_size=2))
    timed = time_of(each, Rates(link=1e6, memory=28e6, flops=6e6, tokens=2))
    assert (timed.communication, timed.optimizer, timed.compute) == (4.0, 1.0, 2.0)
    assert (timed.shortest, timed.longest) == (5.0, 7.0)
    assert time_of(each, Rates()).longest is None
    assert time_of(each, Rates(memory=28e6)).shortest == 1.0


def test_links_inside_of_shard_groups_are_used_inside_of_shard_groups() -> None:
    rates = Rates(link=1e6, shard_link=1e9)
    model = from_shapes({"layers.0.w": [1024, 1024]})
    everywhere, grouped = (plan(model, "zero2", Setup(world_size=16, shard_size=size)) for size in (None, 8))
    assert time_of(everywhere, rates).communication == pytest.approx(everywhere.sent / 1e6)
    across = sum(each.sent for each in grouped.collectives if each.operation == "all-reduce")
    assert time_of(grouped, rates).communication == pytest.approx(across / 1e6 + (grouped.sent - across) / 1e9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 0}, "at least 1 rank, got 0"),
        ({"world_size": 8, "shard_size": 3}, "shard size divides the world size.*got 3 and 8"),
        ({"optimizer": "Lion"}, "optimizer is one of Adam, .*got 'Lion'"),
        ({"reduce_dtype": "fp8"}, "dtype of the reduction is one of fp32, bf16, fp16, got 'fp8'"),
        ({"dtype": "fp8"}, "dtype is one of fp32, bf16, fp16, got 'fp8'"),
        ({"bucket_bytes": 0}, "at least 1 byte, got 0"),
    ],
)
def test_a_setup_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Setup(**options)


def test_a_shard_size_where_it_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="a shard size is for zero1, zero2, hsdp, got 2 with fsdp2"):
        plan(AWKWARD, "fsdp2", Setup(world_size=4, shard_size=2))
    with pytest.raises(ValueError, match="hsdp needs a shard size"):
        plan(AWKWARD, "hsdp", Setup(world_size=4))


def test_a_dtype_of_the_reduction_where_there_is_no_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="a dtype of the reduction is for zero3, fsdp2, hsdp, got fp32 with ddp"):
        plan(AWKWARD, "ddp", Setup(world_size=4, dtype="bf16", reduce_dtype="fp32"))


def test_gradients_that_are_reduced_in_fp32_are_twice_as_many_bytes_as_in_bf16() -> None:
    setup = Setup(world_size=8, shard_size=4, dtype="bf16")
    for low, full in zip(compare(GPT2, setup), compare(GPT2, replace(setup, reduce_dtype="fp32")), strict=True):
        reduced = [sum(each.sent for each in plan.collectives if "gradients" in each.what) for plan in (low, full)]
        assert reduced[1] == (2 if low.sharding in ("zero3", "fsdp2", "hsdp") else 1) * reduced[0]
        assert full.sent - low.sent == reduced[1] - reduced[0]
