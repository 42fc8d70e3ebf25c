"""Estimate memory, communication and time of every way of sharding: by kind of memory, bytes sent in a step, and given rates.

Arithmetic on shapes, as fast for 65,536 ranks as for one. Memory is that of the rank that holds most. What is held at different times of a
step is added up, so a total is at least the peak of what is counted. Used by the command `sharded-optim plan`.

Bytes sent by each of n ranks, by a ring or directly: reduce-scatter and all-gather of B bytes (n - 1) / n * B, all-reduce twice that.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from sharded_optim import optimizers
from sharded_optim.formulas import Algorithm
from sharded_optim.formulas.verdict import SECTIONS, TAIL
from sharded_optim.sharding.buckets import IN_FLIGHT, BucketPlan, Size, default_bucket_bytes, plan_buckets
from sharded_optim.storage.formats import FORMATS, param_format, state_formats
from sharded_optim.tools.plan_matrices import MatrixWork, Span, heaviest, is_hidden_matrix, work_on
from sharded_optim.tools.shapes import Model, Shape

__all__ = [
    "BACKENDS",
    "DTYPES",
    "KINDS",
    "MASTERS",
    "OPTIMIZERS",
    "SHARDINGS",
    "Collective",
    "Memory",
    "Plan",
    "Rates",
    "Setup",
    "Time",
    "compare",
    "plan",
    "time_of",
]

DTYPES: Mapping[str, int] = {name: FORMATS[name].itemsize for name in ("fp32", "bf16", "fp16")}  # bytes
FP32 = DTYPES["fp32"]
MASTERS = ("fp32", "kahan", "none")
BACKENDS = ("nccl", "gloo")


class Algorithms(NamedTuple):
    """What steps hidden matrices, and what steps the rest: mostly the same."""

    matrices: Algorithm
    rest: Algorithm


def _algorithms() -> Iterator[tuple[str, Algorithms]]:
    """Of each class; where an argument asks for others, these are named `class+argument`."""
    for name, optimizer in optimizers.OPTIMIZERS.items():
        of_matrices = next((each for each in optimizer.algorithms.values() if each.matrix is not None), None)
        of_rest = [(argument, each) for argument, each in optimizer.algorithms.items() if each.matrix is None]
        for number, (argument, each) in enumerate(of_rest):
            yield f"{name}+{argument}" if number else name, Algorithms(of_matrices or each, each)


OPTIMIZERS: Mapping[str, Algorithms] = dict(_algorithms())
KINDS = ("parameters", "gradients", "moments", "masters", "buckets")
UNIT = re.compile(r"^(?:.*?\.)?\d+\.")  # of a parameter's name: up to its first number, as `layers.3.`
GATHERED = 2  # units of FSDP2 and ZeRO-3 whose parameters are there at one time: one computes while the next arrives


def _one_of(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} is one of {', '.join(allowed)}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The settings of a training run that do not depend on the sharding.

    Attributes:
        world_size: ranks that train one model together.
        shard_size: ranks over which one copy of it is sharded; the other ranks hold replicas. None: all.
        optimizer: one of OPTIMIZERS.
        dtype: of the parameters in forward and backward.
        masters: beside parameters in 16 bits: "fp32" copies, "kahan" compensations in the parameters' dtype, or "none".
        state_dtype: of the moments: one of `state_formats()`.
        bucket_bytes: of ZeRO-1 and ZeRO-2; None is ShardedOptimizer's default.
        backend: "nccl", or "gloo", whose reduce-scatter needs buffers for what is received.
    """

    world_size: int = 1
    shard_size: int | None = None
    optimizer: str = "AdamW"
    dtype: str = "fp32"
    masters: str = "fp32"
    state_dtype: str = "fp32"
    bucket_bytes: int | None = None
    backend: str = "nccl"

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"the world has at least 1 rank, got {self.world_size}")
        if self.shard_size is not None and (self.shard_size < 1 or self.world_size % self.shard_size):
            raise ValueError(
                f"a shard size divides the world size, so that every shard group has a replica of the model, got {self.shard_size} and "
                f"{self.world_size}"
            )
        if self.bucket_bytes is not None and self.bucket_bytes < 1:
            raise ValueError(f"a bucket has at least 1 byte, got {self.bucket_bytes}")
        _one_of("optimizer", self.optimizer, tuple(OPTIMIZERS))
        _one_of("dtype", self.dtype, tuple(DTYPES))
        _one_of("masters", self.masters, MASTERS)
        _one_of("state dtype", self.state_dtype, state_formats())
        _one_of("backend", self.backend, BACKENDS)

    @property
    def algorithms(self) -> Algorithms:
        return OPTIMIZERS[self.optimizer]

    def algorithm_of(self, name: str, shape: Shape) -> Algorithm:
        return self.algorithms.matrices if is_hidden_matrix(name, shape) else self.algorithms.rest

    @property
    def agrees(self) -> bool:
        """Whether ranks agree in each step."""
        return any(each.statistic is not None or each.matrix is not None for each in self.algorithms)

    @property
    def itemsize(self) -> int:
        """Bytes of an element of a parameter in forward and backward."""
        return DTYPES[self.dtype]

    @property
    def has_masters(self) -> bool:
        return self.itemsize < FP32 and self.masters == "fp32"

    @property
    def master_itemsize(self) -> int:
        """Bytes of the master copy of an element."""
        if self.has_masters:
            return FP32
        stored = param_format(FORMATS[self.dtype].dtype, kahan_sum=self.masters == "kahan", stochastic_rounding=False)
        return stored.itemsize - self.itemsize

    def moments_itemsize(self, algorithm: Algorithm) -> int:
        """Bytes of all moments of an element."""
        return len(algorithm.state) * FORMATS[self.state_dtype].itemsize


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory in bytes, of the rank that holds most."""

    parameters: int  # as they are kept between steps
    gradients: int  # as they are when backward is over
    moments: int  # without the step counters, 4 bytes for each tensor
    masters: int  # or Kahan compensations
    buckets: int  # every other buffer: DDP's copies, what is gathered or reduced, the most at one time

    @property
    def total(self) -> int:
        return sum(getattr(self, kind) for kind in KINDS)


@dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of a step that serve one purpose."""

    operation: str  # "all-gather", "reduce-scatter", "all-reduce" or "all-to-all"
    what: str  # is communicated
    ranks: int  # that take part in each
    in_shard_group: bool  # rather than across replicas, or over all ranks
    sent: int  # bytes, by each rank in a step; in an all-to-all, in the mean


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The requirements of one way of sharding, for each rank."""

    sharding: str
    ranks: int
    shards: int  # ranks over which a copy of the model is sharded
    memory: Memory
    collectives: tuple[Collective, ...]
    stepped: int  # bytes that the optimizer's step reads and writes
    matrix_flops: int  # of the rank that computes with most matrices in a step (Muon)
    flops_per_token: int  # 2 for each parameter in forward, 4 in backward

    @property
    def name(self) -> str:
        return self.sharding if self.shards in (1, self.ranks) else f"{self.sharding} over {self.shards}"

    @property
    def sent(self) -> int:
        """Bytes that each rank sends in a step."""
        return sum(collective.sent for collective in self.collectives)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates of compute, memory and links; None where unknown."""

    link: float | None = None  # bytes that a rank sends per second
    shard_link: float | None = None  # the same inside of shard groups that are smaller than the world; None: as `link`
    memory: float | None = None  # bytes that a rank reads and writes per second
    flops: float | None = None  # that a rank does per second
    tokens: int | None = None  # of a rank in a step

    def __post_init__(self) -> None:
        for name in ("link", "shard_link", "memory", "flops", "tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"a rate is a finite number > 0, got {value} for {name}; leave it out if it is not known")
        if (self.flops is None) != (self.tokens is None):
            raise ValueError(f"the time of forward and backward needs tokens and FLOP/s, got {self.tokens} and {self.flops}; give both")
        if self.shard_link is not None and self.link is None:
            raise ValueError("the link inside of shard groups is given beside the link of all ranks; give that too")


@dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds of the parts of a step; None where a rate was not given."""

    communication: float | None
    optimizer: float | None
    matrices: float | None  # of the rank that computes with most of them
    compute: float | None

    @property
    def longest(self) -> float | None:
        """Time if nothing overlaps, of the parts that are known."""
        known = [part for part in (self.communication, self.optimizer, self.matrices, self.compute) if part is not None]
        return sum(known) if known else None

    @property
    def shortest(self) -> float | None:
        """Time if communication and computation overlap completely."""
        if self.longest is None or self.compute is None or self.communication is None:
            return self.longest
        return max(self.compute, self.communication) + (self.optimizer or 0.0) + (self.matrices or 0.0)


def plan(model: Model, sharding: str, setup: Setup) -> Plan:
    """Plan one of SHARDINGS.

    Raises:
        ValueError: no such sharding, or one that does not go together with the shard size.
    """
    _one_of("sharding", sharding, tuple(SHARDINGS))
    if sharding == "hsdp" and setup.shard_size is None:
        raise ValueError("hsdp needs a shard size, the ranks over which one copy of the model is sharded; with all ranks it is fsdp2")
    if sharding not in HYBRID and setup.shard_size is not None:
        raise ValueError(f"a shard size is for {', '.join(HYBRID)}, got {setup.shard_size} with {sharding}; leave it out")
    return SHARDINGS[sharding](_Case(sharding=sharding, model=model, setup=setup))


def compare(model: Model, setup: Setup) -> list[Plan]:
    """Plan every sharding: over all ranks and, with a shard size, in groups of that size where possible."""
    whole = replace(setup, shard_size=None)
    plans = [plan(model, sharding, whole) for sharding in SHARDINGS if sharding != "hsdp"]
    return plans + [plan(model, sharding, setup) for sharding in HYBRID if setup.shard_size is not None]


def time_of(plan: Plan, rates: Rates) -> Time:
    """Estimate the time of a step at these rates, without latencies."""
    communication = None
    if rates.link is not None:
        inside = rates.shard_link or rates.link
        communication = sum(each.sent / (inside if each.in_shard_group else rates.link) for each in plan.collectives)
    compute = matrices = None
    if rates.tokens is not None and rates.flops is not None:
        compute = plan.flops_per_token * rates.tokens / rates.flops
        matrices = plan.matrix_flops / rates.flops if plan.matrix_flops else None
    optimizer = None if rates.memory is None else plan.stepped / rates.memory
    return Time(communication=communication, optimizer=optimizer, matrices=matrices, compute=compute)


# ------------------------------------------------------------------------------------------------------------------- the shardings


@dataclass(frozen=True, kw_only=True)
class _Case:
    """A model, a sharding and a setup, and quantities that several shardings use."""

    sharding: str
    model: Model
    setup: Setup

    @property
    def ranks(self) -> int:
        return self.setup.world_size

    @property
    def shards(self) -> int:
        return self.setup.shard_size or self.ranks

    @property
    def grouped(self) -> bool:
        """Return whether ranks shard in groups, whose links may be faster."""
        return self.setup.shard_size is not None

    @cached_property
    def numel(self) -> int:
        return self.model.numel

    def spans(self, shard_of: Callable[[Shape], int]) -> list[Span]:
        """The tensors, each cut into shards of so many elements."""
        return [Span(name, shape, 0, shard_of(shape)) for name, shape in self.model.shapes.items()]

    def reduce_scatter(self, what: str, shard_bytes: int) -> Collective:
        sent = shard_bytes * (self.shards - 1)
        return Collective(operation="reduce-scatter", what=what, ranks=self.shards, in_shard_group=self.grouped, sent=sent)

    def all_gather(self, what: str, shard_bytes: int) -> Collective:
        sent = shard_bytes * (self.shards - 1)
        return Collective(operation="all-gather", what=what, ranks=self.shards, in_shard_group=self.grouped, sent=sent)

    def all_to_all(self, what: str, sent: int) -> Collective:
        return Collective(operation="all-to-all", what=what, ranks=self.ranks, in_shard_group=False, sent=sent)

    def all_reduce(self, what: str, size: int, ranks: int) -> Collective:
        sent = -(-2 * (ranks - 1) * size // ranks)
        return Collective(operation="all-reduce", what=what, ranks=ranks, in_shard_group=False, sent=sent)

    def result(
        self,
        *,
        shards: int,
        parameters: int,  # bytes, as the gradients and the buckets
        gradients: int,
        spans: Sequence[Span],  # of what this rank's optimizer steps
        buckets: int,
        collectives: Sequence[Collective],
        steps_parameters: bool = False,  # that are fp32 themselves, so that there are no masters
        masters: int | None = None,  # elements of masters, where they are not those that are stepped
        grad_itemsize: int,  # of the gradients that the optimizer reads
    ) -> Plan:
        setup = self.setup

        def algorithm_of(span: Span) -> Algorithm:
            return setup.algorithm_of(span.name, span.shape)

        master = 0 if steps_parameters and setup.has_masters else setup.master_itemsize
        further = []
        if setup.agrees:
            further.append(self.all_reduce("statistics", 8 * (SECTIONS * len(self.model.shapes) + TAIL), self.ranks))
        work = MatrixWork()
        matrix = setup.algorithms.matrices.matrix
        if matrix is not None:
            of_matrices = [span for span in spans if algorithm_of(span) is setup.algorithms.matrices]
            work = work_on(of_matrices, matrix, shards=shards, replicas=self.ranks // shards)
            further += [self.all_to_all("directions of matrices", work.directions), self.all_to_all("matrices", work.results)]
        memory = Memory(
            parameters=parameters,
            gradients=gradients,
            moments=heaviest(spans, lambda span: setup.moments_itemsize(algorithm_of(span))),
            masters=(heaviest(spans, lambda span: 1) if masters is None else masters) * master,
            buckets=buckets + work.buffers,
        )
        return Plan(
            sharding=self.sharding,
            ranks=self.ranks,
            shards=shards,
            memory=memory,
            collectives=tuple(each for each in (*collectives, *further) if each.sent),
            stepped=heaviest(spans, lambda span: self._stepped_itemsize(algorithm_of(span), grad_itemsize, steps_parameters)),
            matrix_flops=work.flops,
            flops_per_token=6 * (self.numel - self.model.idle),
        )

    def _stepped_itemsize(self, algorithm: Algorithm, grad: int, steps_parameters: bool) -> int:
        """Bytes that a step moves for each element: it reads the gradient, and reads and writes the value and the moments."""
        setup = self.setup
        if setup.has_masters:
            value = 2 * FP32 + (0 if steps_parameters else setup.itemsize)  # parameters are only written, from their masters
        else:
            value = 2 * (setup.itemsize + setup.master_itemsize)
        moved = grad + value + 2 * setup.moments_itemsize(algorithm)
        if algorithm.matrix is not None:
            moved += 2 * algorithm.matrix.dtype.itemsize  # a direction is written, a result read
        if setup.agrees:
            moved += grad  # is it finite? And a statistic is of the second moment too.
        return moved + (FORMATS[setup.state_dtype].itemsize if algorithm.statistic is not None else 0)


def _none(case: _Case) -> Plan:
    """No sharding: every rank has the whole model and trains alone."""
    alone = replace(case, setup=replace(case.setup, world_size=1))
    size = case.numel * case.setup.itemsize
    result = alone.result(
        shards=1,
        parameters=size,
        gradients=size,
        spans=alone.spans(math.prod),
        buckets=0,
        collectives=(),
        grad_itemsize=case.setup.itemsize,
    )
    return replace(result, ranks=case.ranks)


def _ddp(case: _Case) -> Plan:
    """DistributedDataParallel: its buckets are a second copy of the gradients, unless gradient_as_bucket_view=True."""
    size = case.numel * case.setup.itemsize
    return case.result(
        shards=1,
        parameters=size,
        gradients=size,
        spans=case.spans(math.prod),
        buckets=size,
        collectives=(case.all_reduce("gradients", size, case.ranks),),
        grad_itemsize=case.setup.itemsize,
    )


def _zero1(case: _Case) -> Plan:
    return _flat_buckets(case, keeps_contents=True)


def _zero2(case: _Case) -> Plan:
    return _flat_buckets(case, keeps_contents=False)


def _flat_buckets(
    case: _Case,
    *,
    keeps_contents: bool,  # the full gradients of all buckets (ZeRO-1), or of those in flight (ZeRO-2)
) -> Plan:
    """ShardedOptimizer: parameters lie in flat buckets, and each rank steps a shard of each bucket."""
    setup, shards = case.setup, case.shards
    tensors = list(case.model.shapes.items())
    if setup.algorithms.matrices is not setup.algorithms.rest:  # as the param groups of muon_param_groups
        tensors.sort(key=lambda tensor: (not is_hidden_matrix(*tensor), len(tensor[1]) < 2))
    sizes = [Size(numel=math.prod(shape), itemsize=setup.itemsize) for _, shape in tensors]
    plans = plan_buckets(sizes, shards, setup.bucket_bytes or default_bucket_bytes(shards))
    whole = sum(bucket.numel for bucket in plans)
    spans = [
        Span(*tensors[index], offset, bucket.numel // shards)
        for bucket in plans
        for index, offset in zip(bucket.members, bucket.offsets, strict=True)
    ]
    contents = heapq.nlargest(IN_FLIGHT + 1, (bucket.numel for bucket in plans))  # those in flight, while the next is filled
    # What autograd has just computed, but for a gradient that is sent from where it is.
    arriving = max(
        (sizes[index].numel for bucket in plans for index in bucket.members if keeps_contents or not _is_lone(bucket, sizes)), default=0
    )
    received = sum(contents) * (shards - 1) // shards if setup.backend == "gloo" else 0
    buckets = arriving + received + (0 if keeps_contents else sum(contents))
    kept = whole if keeps_contents else 0
    grad_itemsize = FP32 if setup.has_masters else setup.itemsize
    averaged = whole // shards * grad_itemsize
    if case.ranks == 1:  # gradients stay where autograd has put them, but for copies that masters are stepped with
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


def _zero3(case: _Case) -> Plan:
    """ZeRO-3: every tensor is cut flat, and gathered with its unit for forward and again for backward."""
    setup, shards = case.setup, case.shards
    units: dict[str, int] = {}  # elements of a rank's shard
    for name, shape in case.model.shapes.items():
        unit = _unit(name)
        units[unit] = units.get(unit, 0) + -(-math.prod(shape) // shards)
    shard = sum(units.values())
    largest = heapq.nlargest(GATHERED, units.values())
    grad_itemsize = FP32 if setup.has_masters else setup.itemsize
    return case.result(
        shards=shards,
        parameters=shard * setup.itemsize,
        gradients=shard * grad_itemsize,
        spans=case.spans(lambda shape: -(-math.prod(shape) // shards)),
        # Gathered, and the gradients of the largest unit with the buffer that is reduce-scattered.
        buckets=(sum(largest) + 2 * largest[0]) * shards * setup.itemsize,
        collectives=(
            case.all_gather("parameters, for forward", shard * setup.itemsize),
            case.all_gather("parameters, for backward", shard * setup.itemsize),
            case.reduce_scatter("gradients", shard * setup.itemsize),
        ),
        grad_itemsize=grad_itemsize,
    )


def _fsdp2(case: _Case) -> Plan:
    """fully_shard on every block and on the whole model: tensors are cut into rows; each rank holds as many as the first, with padding.

    What lies in no block is the root, which stays gathered from forward to the end of backward. Parameters in 16 bits with fp32 masters are
    FSDP2's mixed precision: fp32 parameters, which are gathered and whose gradients are reduced in 16 bits.
    """
    setup, shards = case.setup, case.shards
    units: dict[str, int] = {"": 0}  # elements of a rank's shard
    for name, shape in case.model.shapes.items():
        unit = _unit(name)
        units[unit] = units.get(unit, 0) + _rows_of_first(shape, shards)
    shard, root = sum(units.values()), units.pop("")
    blocks = heapq.nlargest(GATHERED, units.values()) or [0]
    kept_itemsize = FP32 if setup.has_masters else setup.itemsize
    return case.result(
        shards=shards,
        parameters=shard * kept_itemsize,
        gradients=shard * kept_itemsize,
        spans=case.spans(lambda shape: _rows_of_first(shape, shards)),
        # Gathered, the root's gradients, and of the largest block gradients and the buffer that is reduce-scattered.
        buckets=(2 * root + sum(blocks) + 2 * blocks[0]) * shards * setup.itemsize,
        collectives=(
            case.all_gather("parameters, for forward", shard * setup.itemsize),
            case.all_gather("parameters of blocks, for backward", (shard - root) * setup.itemsize),
            case.reduce_scatter("gradients", shard * setup.itemsize),
            case.all_reduce("shards of gradients", shard * setup.itemsize, case.ranks // shards),
        ),
        steps_parameters=True,
        grad_itemsize=kept_itemsize,
    )


def _rows_of_first(shape: Shape, shards: int) -> int:
    """Return the elements of a tensor on the first rank, and with padding on every other; a scalar counts as one row, as in FSDP2."""
    rows, *others = shape or (1,)
    return -(-rows // shards) * math.prod(others)


def _unit(name: str) -> str:
    """Return the block of a parameter; "" outside of numbered blocks."""
    match = UNIT.match(name)
    return match[0] if match else ""


SHARDINGS: Mapping[str, Callable[[_Case], Plan]] = {
    "none": _none,
    "ddp": _ddp,
    "zero1": _zero1,
    "zero2": _zero2,
    "zero3": _zero3,
    "fsdp2": _fsdp2,
    "hsdp": _fsdp2,
}
HYBRID = ("zero1", "zero2", "hsdp")  # that can be sharded in groups, with replicas across them
