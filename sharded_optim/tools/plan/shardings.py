"""Plan every way of sharding: the memory of a rank, and its collectives."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from sharded_optim.sharding.buckets import IN_FLIGHT, BucketPlan, Size, default_bucket_bytes, plan_buckets
from sharded_optim.tools.plan.case import Case, Plan
from sharded_optim.tools.plan.matrices import Span, is_hidden_matrix
from sharded_optim.tools.plan.setup import FP32, Setup, one_of
from sharded_optim.tools.plan.workload import Workload, measure
from sharded_optim.tools.shapes import Model, Shape, block_of

__all__ = ["SHARDINGS", "compare", "plan"]

GATHERED = 2  # units of FSDP2 and ZeRO-3 that are gathered at one time: one computes while the next arrives


def plan(model: Model, sharding: str, setup: Setup, workload: Workload | None = None) -> Plan:
    """Plan one way of sharding.

    Args:
        sharding: a key of SHARDINGS.
        workload: forward and backward, from `measure`; None: FLOPs of the parameters alone are known.

    Raises:
        ValueError: there is no such sharding, or it does not fit the shard size or the dtype of the reduction.
    """
    one_of("sharding", sharding, tuple(SHARDINGS))
    if sharding == "hsdp" and setup.shard_size is None:
        raise ValueError("hsdp needs a shard size, the ranks over which one copy of the model is sharded; with all ranks it is fsdp2")
    if sharding not in HYBRID and setup.shard_size is not None:
        raise ValueError(f"a shard size is for {', '.join(HYBRID)}, got {setup.shard_size} with {sharding}; leave it out")
    if sharding not in REDUCES_IN_ANY_DTYPE and setup.reduce_dtype is not None:
        raise ValueError(
            f"a dtype of the reduction is for {', '.join(REDUCES_IN_ANY_DTYPE)}, got {setup.reduce_dtype} with {sharding}, which reduces "
            "gradients in the dtype of the parameters; leave it out"
        )
    workload = measure(model, setup) if workload is None else workload
    return SHARDINGS[sharding](Case(sharding=sharding, model=model, setup=setup, workload=workload))


def compare(model: Model, setup: Setup, workload: Workload | None = None) -> list[Plan]:
    """Plan every sharding: over all ranks and, with a shard size, in groups of that size where possible.

    Shardings that can reduce only in the dtype of the parameters ignore the setup's `reduce_dtype`.
    """
    whole = replace(setup, shard_size=None)
    cases = [(sharding, whole) for sharding in SHARDINGS if sharding != "hsdp"]
    cases += [(sharding, setup) for sharding in HYBRID if setup.shard_size is not None]
    return [
        plan(model, sharding, each if sharding in REDUCES_IN_ANY_DTYPE else replace(each, reduce_dtype=None), workload)
        for sharding, each in cases
    ]


def _none(case: Case) -> Plan:
    """No sharding: every rank has the whole model and trains alone."""
    alone = replace(case, setup=replace(case.setup, world_size=1))
    return replace(_replicated(alone, buckets=0), ranks=case.ranks)


def _ddp(case: Case) -> Plan:
    """DistributedDataParallel: its buckets are a second copy of the gradients, unless gradient_as_bucket_view=True."""
    return _replicated(case, buckets=case.numel * case.setup.itemsize)


def _replicated(case: Case, *, buckets: int) -> Plan:
    size = case.numel * case.setup.itemsize
    return case.result(
        shards=1,
        parameters=size,
        gradients=size,
        spans=case.spans(math.prod),
        buckets=buckets,
        collectives=(case.all_reduce("gradients", size, case.ranks),),
        grad_itemsize=case.setup.itemsize,
    )


def _flat_buckets(
    case: Case,
    *,
    keeps_contents: bool,  # whether full gradients of all buckets are kept (ZeRO-1), or only of those in flight (ZeRO-2)
) -> Plan:
    """ShardedOptimizer: parameters lie in flat buckets, and each rank steps a shard of each bucket."""
    setup, shards = case.setup, case.shards
    tensors = list(case.model.shapes.items())
    if setup.algorithms.matrices is not setup.algorithms.rest:  # the order of the param groups of muon_param_groups
        tensors.sort(key=lambda tensor: (not is_hidden_matrix(*tensor), len(tensor[1]) < 2))
    sizes = [Size(numel=math.prod(shape), itemsize=setup.itemsize) for _, shape in tensors]
    plans = plan_buckets(sizes, shards, setup.bucket_bytes or default_bucket_bytes(shards))
    whole = sum(bucket.numel for bucket in plans)
    spans = [
        Span(*tensors[index], offset, bucket.numel // shards)
        for bucket in plans
        for index, offset in zip(bucket.members, bucket.offsets, strict=True)
    ]
    contents = heapq.nlargest(IN_FLIGHT + 1, (bucket.numel for bucket in plans))  # the buckets in flight, and the one being filled
    # The gradient that autograd has just computed, unless it is sent without a copy.
    arriving = max(
        (sizes[index].numel for bucket in plans for index in bucket.members if keeps_contents or not _is_lone(bucket, sizes)), default=0
    )
    received = sum(contents) * (shards - 1) // shards if setup.backend == "gloo" else 0
    buckets = arriving + received + (0 if keeps_contents else sum(contents))
    kept = whole if keeps_contents else 0
    grad_itemsize = FP32 if setup.has_masters else setup.itemsize
    averaged = whole // shards * grad_itemsize
    if case.ranks == 1:  # gradients stay where autograd has put them, except for fp32 copies with which masters are stepped
        buckets, kept, averaged = 0, case.numel, case.numel * FP32 if setup.has_masters else 0
    shard = whole // shards * setup.itemsize
    return case.result(
        shards=shards,
        parameters=whole * setup.itemsize,
        gradients=averaged + kept * setup.itemsize,
        spans=spans,
        masters=whole // shards if setup.has_masters else None,
        buckets=buckets * setup.itemsize,
        collectives=(
            case.reduce_scatter("gradients", shard),
            case.all_reduce("shards of gradients", whole // shards * grad_itemsize, case.ranks // shards),
            case.all_reduce("which tensors have a gradient", 4 * (len(sizes) + 2), case.ranks),
            case.all_gather("parameters", shard),
        ),
        grad_itemsize=grad_itemsize,
    )


def _is_lone(bucket: BucketPlan, sizes: Sequence[Size]) -> bool:
    """Return whether a tensor has a bucket of its own."""
    return len(bucket.members) == 1 and sizes[bucket.members[0]].numel == bucket.numel


def _zero3(case: Case) -> Plan:
    """ZeRO-3: every tensor is cut flat, and gathered with its unit for forward and again for backward."""
    setup, shards = case.setup, case.shards
    units: dict[str, int] = {}  # elements of a rank's shard, by unit
    for name, shape in case.model.shapes.items():
        unit = block_of(name)
        units[unit] = units.get(unit, 0) + -(-math.prod(shape) // shards)
    shard = sum(units.values())
    largest = heapq.nlargest(GATHERED, units.values())
    grad_itemsize = FP32 if setup.has_masters else setup.itemsize
    return case.result(
        shards=shards,
        parameters=shard * setup.itemsize,
        gradients=shard * grad_itemsize,
        spans=case.spans(lambda shape: -(-math.prod(shape) // shards)),
        # Gathered parameters, the gradients of the largest unit, and the buffer in which they are reduce-scattered.
        buckets=((sum(largest) + largest[0]) * setup.itemsize + largest[0] * setup.reduce_itemsize) * shards,
        collectives=(
            case.all_gather("parameters, for forward", shard * setup.itemsize),
            case.all_gather("parameters, for backward", shard * setup.itemsize),
            case.reduce_scatter("gradients", shard * setup.reduce_itemsize),
        ),
        grad_itemsize=grad_itemsize,
    )


def _fsdp2(case: Case) -> Plan:
    """FSDP2: fully_shard on every block and the whole model. Tensors are cut into rows; each rank holds as many as the first, by padding.

    Parameters outside of blocks form the root unit, which stays gathered from forward to the end of backward. 16-bit parameters with fp32
    masters stand for FSDP2's mixed precision: fp32 parameters that are gathered, and whose gradients are reduced, in 16 bits.
    """
    setup, shards = case.setup, case.shards
    units: dict[str, int] = {"": 0}  # elements of a rank's shard, by unit; "" is the root
    for name, shape in case.model.shapes.items():
        unit = block_of(name)
        units[unit] = units.get(unit, 0) + _rows_of_first(shape, shards)
    shard, root = sum(units.values()), units.pop("")
    blocks = heapq.nlargest(GATHERED, units.values()) or [0]
    kept_itemsize = FP32 if setup.has_masters else setup.itemsize
    # The gathered root and blocks, gradients of the largest block, and the buffer in which they are reduce-scattered. The root's own buffer
    # is filled when blocks and the gathered root have been freed.
    in_blocks = (root + sum(blocks) + blocks[0]) * setup.itemsize + blocks[0] * setup.reduce_itemsize
    buckets = root * setup.itemsize + max(in_blocks, root * setup.reduce_itemsize)  # the first term: gradients of the root
    return case.result(
        shards=shards,
        parameters=shard * kept_itemsize,
        gradients=shard * kept_itemsize,
        spans=case.spans(lambda shape: _rows_of_first(shape, shards)),
        buckets=buckets * shards,
        collectives=(
            case.all_gather("parameters, for forward", shard * setup.itemsize),
            case.all_gather("parameters of blocks, for backward", (shard - root) * setup.itemsize),
            case.reduce_scatter("gradients", shard * setup.reduce_itemsize),
            case.all_reduce("shards of gradients", shard * setup.reduce_itemsize, case.ranks // shards),
        ),
        steps_parameters=True,
        grad_itemsize=kept_itemsize,
    )


def _rows_of_first(shape: Shape, shards: int) -> int:
    """Return the elements of a tensor on the first rank, and with padding on every rank; a scalar counts as one row, as in FSDP2."""
    rows, *others = shape or (1,)
    return -(-rows // shards) * math.prod(others)


SHARDINGS: Mapping[str, Callable[[Case], Plan]] = {
    "none": _none,
    "ddp": _ddp,
    "zero1": partial(_flat_buckets, keeps_contents=True),
    "zero2": partial(_flat_buckets, keeps_contents=False),
    "zero3": _zero3,
    "fsdp2": _fsdp2,
    "hsdp": _fsdp2,
}
REDUCES_IN_ANY_DTYPE = ("zero3", "fsdp2", "hsdp")  # the others reduce in the dtype of the parameters
HYBRID = ("zero1", "zero2", "hsdp")  # can shard within groups of ranks, with replicas across groups
