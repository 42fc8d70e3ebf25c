"""Plan a step of whole matrices (Muon) from shapes: communication, memory and computation of its ranks. Used by `case.py`.

Matrices are assigned to ranks as in a step (`sharding/matrices.py`). Bytes sent are the mean over the ranks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import accumulate, islice
from typing import NamedTuple

from sharded_optim.formulas import Matrix
from sharded_optim.optimizers.muon import ROUTERS, Muon
from sharded_optim.sharding.matrices import choose_owners, choose_rounds

__all__ = ["MatrixWork", "Span", "heaviest", "is_hidden_matrix", "work_on"]

MUON_DEFAULTS = {name: param.default for name, param in signature(Muon).parameters.items()}
SLOTS = 2  # rounds whose buffers exist at one time


class Span(NamedTuple):
    """A tensor in a buffer that is cut into consecutive shards of equal size."""

    name: str
    shape: tuple[int, ...]
    start: int  # offset of the tensor's first element
    shard: int  # elements of a shard

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def elements(self, shard: int) -> int:
        """Return the number of the tensor's elements in a shard."""
        return max(0, min(self.start + self.numel, (shard + 1) * self.shard) - max(self.start, shard * self.shard))

    @property
    def holders(self) -> range:
        """The shards that hold elements of the tensor."""
        return range(self.start // self.shard, (self.start + self.numel - 1) // self.shard + 1) if self.numel else range(0)


def heaviest(spans: Sequence[Span], weight: Callable[[Span], int]) -> int:
    """Return the largest weight of a shard: the sum over its elements, each with the weight of its tensor."""
    changes: defaultdict[int, int] = defaultdict(int)  # change of the sum from one shard to the next

    def add(first: int, end: int, each: int) -> None:
        changes[first] += each
        changes[end] -= each

    for span in spans:
        factor, holders = weight(span), span.holders
        for shard in {*holders[:1], *holders[-1:]}:
            add(shard, shard + 1, factor * span.elements(shard))
        if len(holders) > 2:
            add(holders[1], holders[-1], factor * span.shard)
    return max(accumulate(changes[shard] for shard in sorted(changes)), default=0)


def is_hidden_matrix(name: str, shape: Sequence[int]) -> bool:
    """Return whether `muon_param_groups` assigns a tensor to Muon, by name and shape: matrices in numbered layers, except routers."""
    *modules, _ = name.split(".")
    return len(shape) >= 2 and any(module.isdigit() for module in modules) and modules[-1] not in ROUTERS


@dataclass(frozen=True, kw_only=True)
class MatrixWork:
    """The requirements of a step of whole matrices. `directions` and `results` are the bytes that a rank sends on average."""

    directions: int = 0
    results: int = 0
    buffers: int = 0  # bytes, on the rank that holds most
    flops: int = 0  # on the rank that computes most


def work_on(spans: Sequence[Span], matrix: Matrix, *, shards: int, replicas: int) -> MatrixWork:
    """Plan the exchange of the matrices of these tensors.

    Args:
        spans: the matrices. Each shard has `replicas` copies, on the ranks shard, shard + shards, and so on.
    """
    wholes: list[Span] = []
    flops: list[int] = []
    for span in spans:
        begin = span.start
        for rows, columns in matrix.shapes(span.shape, MUON_DEFAULTS):
            if rows * columns:
                wholes.append(Span(span.name, (rows, columns), begin, span.shard))
                flops.append(matrix.flops(rows, columns))
            begin += rows * columns
    loads = [0] * (shards * replicas)
    # As many candidates as matrices are enough: one of them is always without a matrix, and the first such rank is chosen.
    ranks = {whole.holders: list(islice(_ranks(whole.holders, shards, replicas), len(wholes))) for whole in wholes}
    owners = choose_owners(flops, [ranks[whole.holders] for whole in wholes], loads)
    itemsize = matrix.dtype.itemsize
    sizes = [whole.numel * itemsize for whole in wholes]
    own = [whole.elements(owner % shards) * itemsize for whole, owner in zip(wholes, owners, strict=True)]
    gathered = [size - part for size, part in zip(sizes, own, strict=True)]
    scattered = [replicas * size - part for size, part in zip(sizes, own, strict=True)]
    world_size = shards * replicas
    slot = 0
    if any(scattered):
        for members in choose_rounds(sizes, flops, owners):
            of_owner: defaultdict[int, int] = defaultdict(int)  # bytes received and sent
            for index in members:
                of_owner[owners[index]] += gathered[index] + scattered[index]
            held = heaviest([wholes[index] for index in members if scattered[index]], lambda whole: itemsize)  # sent and received
            slot = max(slot, max(of_owner.values()) + held + min(held, sum(gathered[index] for index in members) // world_size))
    return MatrixWork(
        directions=sum(gathered) // world_size,
        results=sum(scattered) // world_size,
        buffers=heaviest(spans, lambda span: itemsize) + SLOTS * slot,
        flops=int(MUON_DEFAULTS["ns_steps"]) * max(loads, default=0),
    )


def _ranks(holders: range, shards: int, replicas: int) -> Sequence[int]:
    """Return the ranks that hold these shards."""
    if replicas == 1 or len(holders) == shards:
        return range(holders.start, holders.start + len(holders) * replicas)
    return [shard + replica * shards for replica in range(replicas) for shard in holders]
