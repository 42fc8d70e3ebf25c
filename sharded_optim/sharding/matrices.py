"""Plan the exchange of whole matrices: which rank computes with which matrix, and which elements ranks send to each other.

A matrix is a range of a tensor's elements: the whole tensor, one matrix of a stack, or a block of rows. Each matrix has one *owner* among
the ranks that hold a piece of it. In a *round* each owner gathers the missing pieces of some of its matrices, each piece from one replica,
and sends the results to all ranks that hold a piece. A matrix of which only its owner holds pieces is not sent.

`exchange.py` makes the plan from the pieces of all ranks; `step/matrix_exchange.py` carries it out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import attrgetter, itemgetter
from typing import NamedTuple

import torch

from sharded_optim.sharding.segment import Overlap, Segment, overlaps

__all__ = [
    "AllToAll",
    "Holding",
    "Matrices",
    "MatrixPlan",
    "OwnedMatrix",
    "Part",
    "Round",
    "choose_owners",
    "choose_rounds",
    "plan_matrices",
]

ROUND_BYTES = 2**22  # one owner's matrices in a round: enough to use a network well, and small enough to overlap with computation


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """The matrices of which a tensor consists, one after the other in its row-major elements."""

    dtype: torch.dtype  # in which elements are sent
    shapes: tuple[tuple[int, int], ...]
    flops: tuple[int, ...]  # cost of the computation with each matrix, up to a common factor


class Holding(NamedTuple):
    """A piece of a tensor that a rank holds."""

    rank: int
    number: int  # index among the rank's pieces
    segment: Segment


class Part(NamedTuple):
    """Some elements of a matrix, in row-major order, and the contiguous range of a buffer in which they are."""

    begin: int
    end: int
    overlaps: tuple[Overlap, ...]  # where the elements of buffer[begin:end], the source, belong in the matrix, the target

    @property
    def numel(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, kw_only=True)
class AllToAll:
    """The sizes of an all-to-all for this rank: elements to, and from, each rank."""

    sent: list[int]
    received: list[int]


@dataclass(frozen=True, kw_only=True)
class OwnedMatrix:
    """A matrix that this rank computes with."""

    rows: int
    columns: int
    piece: int  # index of one of this rank's pieces of the matrix
    own: list[Part] = field(default_factory=list)  # parts that this rank holds, in the buffer of its pieces
    gathered: list[Part] = field(default_factory=list)  # parts from other ranks, in the received buffer
    results: list[Part] = field(default_factory=list)  # parts of the result for other ranks, in the buffer that is sent back

    @property
    def lies_whole(self) -> bool:
        """Whether the whole matrix is one part of the buffer of this rank's pieces, so that it can be used without a copy."""
        return len(self.own) == 1 and self.own[0].numel == self.rows * self.columns


@dataclass(frozen=True, kw_only=True)
class Round:
    """What this rank sends, computes and receives in one round. Slices are of the buffer of its pieces, in the order of packing."""

    gather: AllToAll
    gathered_from: list[slice]
    matrices: list[OwnedMatrix]
    scatter: AllToAll
    scattered_to: list[slice]


@dataclass(frozen=True, kw_only=True)
class MatrixPlan:
    """This rank's part in gathering the matrices of one dtype, and in sending back the results.

    Attributes:
        numel: number of elements in the buffer of this rank's pieces.
        places: the range of each piece in that buffer, by the piece's index among all of the rank's pieces.
        rounds: this rank's rounds; equally many on all ranks.
        travels: whether any rank sends anything.
        loads: the flops of each rank, including those of the plans before.
    """

    dtype: torch.dtype
    numel: int
    places: dict[int, slice]
    rounds: list[Round]
    travels: bool
    loads: list[int]


@dataclass(kw_only=True, eq=False)
class _Whole:
    """A matrix, and its non-empty parts on all ranks: (piece, begin, end), with the range of the part in the piece."""

    range: Segment
    rows: int
    columns: int
    flops: int
    parts: list[tuple[Holding, int, int]]

    @property
    def holders(self) -> list[int]:
        return sorted({holding.rank for holding, _, _ in self.parts})


def plan_matrices(
    matrices_of: Mapping[str, Matrices],  # by name of the tensor
    holders: Mapping[str, Sequence[Holding]],  # all pieces of these tensors on all ranks, in the same order on every rank
    rank: int,
    world_size: int,
) -> tuple[MatrixPlan, ...]:
    """Plan this rank's part in exchanging whole matrices: one plan per dtype. All arguments but `rank` must be the same on all ranks."""
    wholes: dict[torch.dtype, list[_Whole]] = defaultdict(list)
    pieces: dict[torch.dtype, list[Holding]] = defaultdict(list)
    for name, matrices in matrices_of.items():
        wholes[matrices.dtype] += _wholes(matrices, holders[name])
        pieces[matrices.dtype] += [holding for holding in holders[name] if holding.rank == rank]
    loads, sent = [0] * world_size, [0] * world_size
    return tuple(_plan(dtype, wholes[dtype], pieces[dtype], rank, loads, sent) for dtype in sorted(wholes, key=str))


def _wholes(matrices: Matrices, holders: Sequence[Holding]) -> list[_Whole]:
    tensor = holders[0].segment
    starts = accumulate((rows * columns for rows, columns in matrices.shapes), initial=0)
    found = []
    for start, (rows, columns), flops in zip(starts, matrices.shapes, matrices.flops, strict=False):  # the last start is the end
        end = start + rows * columns
        parts = [(holding, *map(holding.segment.elements_before, (start, end))) for holding in holders]
        parts = [(holding, begin, until) for holding, begin, until in parts if begin < until]
        if start < end:
            elements = Segment.flat(tensor.name, tensor.shape, start, end - start)
            found.append(_Whole(range=elements, rows=rows, columns=columns, flops=flops, parts=parts))
    return found


def choose_owners(flops: Sequence[int], candidates: Sequence[Sequence[int]], loads: list[int]) -> list[int]:
    """Choose an owner for each matrix, so that no rank has much more to compute than others. Adds to `loads`.

    Longest processing time first (Graham 1969): where every rank may own every matrix, the largest load is at most a third above the best
    possible. Matrices with one candidate are assigned first, so that the others even out the loads.

    >>> choose_owners([3, 2, 2, 1], [[0, 1], [0, 1], [0, 1], [1]], [0, 0])
    [0, 1, 0, 1]
    """
    owners = [0] * len(flops)
    for index in sorted(range(len(flops)), key=lambda index: (len(candidates[index]) > 1, -flops[index])):
        owners[index] = min(candidates[index], key=loads.__getitem__)  # of equal loads, the first candidate's
        loads[owners[index]] += flops[index]
    return owners


def _plan(
    dtype: torch.dtype,
    wholes: Sequence[_Whole],
    pieces: Sequence[Holding],
    rank: int,
    loads: list[int],  # flops of each rank so far; written
    sent: list[int],  # elements that each rank sends so far; written
) -> MatrixPlan:
    ends = list(accumulate(holding.segment.numel for holding in pieces))
    places = {holding.number: slice(end - holding.segment.numel, end) for holding, end in zip(pieces, ends, strict=True)}
    flops = [whole.flops for whole in wholes]
    owners = choose_owners(flops, [whole.holders for whole in wholes], loads)
    rounds = choose_rounds([whole.range.numel * dtype.itemsize for whole in wholes], flops, owners)
    return MatrixPlan(
        dtype=dtype,
        numel=ends[-1] if ends else 0,
        places=places,
        rounds=[_round([(owners[index], wholes[index]) for index in members], places, rank, sent) for members in rounds],
        travels=any(len(whole.holders) > 1 for whole in wholes),
        loads=list(loads),
    )


def choose_rounds(sizes: Sequence[int], flops: Sequence[int], owners: Sequence[int]) -> list[list[int]]:
    """Split each owner's matrices into rounds of at most ROUND_BYTES, the most expensive first. A larger matrix has a round of its own.

    Args:
        sizes: bytes of each matrix.

    Returns:
        The indices of the matrices in each round.
    """
    rounds: list[list[int]] = []
    filled: dict[int, tuple[int, int]] = {}  # by owner: index of its last round, and bytes in that round
    for index in sorted(range(len(sizes)), key=lambda index: -flops[index]):
        number, bytes_there = filled.get(owners[index], (0, 0))
        if bytes_there and bytes_there + sizes[index] > ROUND_BYTES:
            number, bytes_there = number + 1, 0
        filled[owners[index]] = number, bytes_there + sizes[index]
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(index)
    return rounds


def _round(members: Sequence[tuple[int, _Whole]], places: Mapping[int, slice], rank: int, sent: list[int]) -> Round:
    """Build this rank's part of a round. Elements from one rank to another are packed in the order of `members` on both."""
    gather, scatter = (AllToAll(sent=[0] * len(sent), received=[0] * len(sent)) for _ in range(2))
    outgoing: list[tuple[int, slice]] = []  # (receiving rank, elements)
    incoming: list[tuple[int, slice]] = []  # (sending rank, elements)
    arriving: list[tuple[int, OwnedMatrix, Part]] = []  # (sending rank, matrix, part)
    returning: list[tuple[int, OwnedMatrix, Part]] = []  # (receiving rank, matrix, part)
    owned: list[OwnedMatrix] = []

    def local(holding: Holding, begin: int, end: int) -> slice:
        start = places[holding.number].start
        return slice(start + begin, start + end)

    for owner, whole in members:
        matrix = None
        if owner == rank:
            own = [(holding, begin, end) for holding, begin, end in whole.parts if holding.rank == rank]
            matrix = OwnedMatrix(rows=whole.rows, columns=whole.columns, piece=own[0][0].number)
            owned.append(matrix)
            for holding, begin, end in own:
                at = local(holding, begin, end)
                matrix.own.append(_part(whole, holding.segment, begin, end, at.start))
        replicas: dict[Segment, list[tuple[Holding, int, int]]] = defaultdict(list)
        for part in whole.parts:
            replicas[part[0].segment].append(part)
        for segment, parts in replicas.items():
            begin, end = parts[0][1:]
            if all(holding.rank != owner for holding, _, _ in parts):
                sender, _, _ = min(parts, key=lambda part: sent[part[0].rank])[0]
                sent[sender] += end - begin
                if sender == rank:
                    gather.sent[owner] += end - begin
                    holding = next(holding for holding, _, _ in parts if holding.rank == rank)
                    outgoing.append((owner, local(holding, begin, end)))
                if matrix is not None:
                    gather.received[sender] += end - begin
                    arriving.append((sender, matrix, _part(whole, segment, begin, end, 0)))
        for holding, begin, end in whole.parts:
            if holding.rank != owner:
                sent[owner] += end - begin
                if holding.rank == rank:
                    scatter.received[owner] += end - begin
                    incoming.append((owner, local(holding, begin, end)))
                if matrix is not None:
                    scatter.sent[holding.rank] += end - begin
                    returning.append((holding.rank, matrix, _part(whole, holding.segment, begin, end, 0)))
    for parts_of, packed in ((attrgetter("gathered"), arriving), (attrgetter("results"), returning)):
        offset = 0
        for _, matrix, part in sorted(packed, key=itemgetter(0)):
            parts_of(matrix).append(part._replace(begin=offset, end=offset + part.numel))
            offset += part.numel
    return Round(
        gather=gather,
        gathered_from=[each for _, each in sorted(outgoing, key=itemgetter(0))],
        matrices=owned,
        scatter=scatter,
        scattered_to=[each for _, each in sorted(incoming, key=itemgetter(0))],
    )


def _part(whole: _Whole, segment: Segment, begin: int, end: int, at: int) -> Part:
    """Describe the elements [begin, end) of a segment, which start at position `at` of the buffer that holds them."""
    found = tuple(replace(each, source=each.source - begin) for each in overlaps(segment, whole.range))
    assert sum(each.run * each.count for each in found) == end - begin, "a range cuts a contiguous part out of a segment"
    return Part(at, at + end - begin, found)
