"""Plan the exchange of whole matrices: which rank computes with which matrix, and which elements the ranks send each other for it.

A matrix is a range of elements of a tensor: all of it, one of a stack, or a block of rows. Each has one *owner* among the ranks that hold
a piece of it. In a *round* the owners gather the pieces that they lack of some matrices, each from one of its replicas, and send the
results to all ranks that hold a piece. A matrix that one rank holds whole is not sent.

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

ROUND_BYTES = 2**22  # of the matrices of one owner in a round: enough for a network, and few enough that most travel under a computation


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """The matrices that a tensor is: its row-major elements, one matrix after the other."""

    dtype: torch.dtype  # in which they are sent
    shapes: tuple[tuple[int, int], ...]
    flops: tuple[int, ...]  # of the computation with each, up to a common factor


class Holding(NamedTuple):
    """A piece of a tensor that a rank holds."""

    rank: int
    number: int  # among the rank's pieces
    segment: Segment


class Part(NamedTuple):
    """Elements of a matrix, in row-major order, that lie contiguously in a buffer."""

    begin: int
    end: int
    overlaps: tuple[Overlap, ...]  # of buffer[begin:end], as the source, with the matrix

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
    piece: int  # one of this rank's pieces of it
    own: list[Part] = field(default_factory=list)  # in the buffer of this rank's pieces
    gathered: list[Part] = field(default_factory=list)  # in the received buffer
    results: list[Part] = field(default_factory=list)  # in the buffer that is sent back

    @property
    def lies_whole(self) -> bool:
        """Whether the elements lie in the buffer as in the matrix."""
        return len(self.own) == 1 and self.own[0].numel == self.rows * self.columns


@dataclass(frozen=True, kw_only=True)
class Round:
    """The part of this rank in one round. Slices are of the buffer of its pieces, in the order in which they are packed."""

    gather: AllToAll
    gathered_from: list[slice]
    matrices: list[OwnedMatrix]
    scatter: AllToAll
    scattered_to: list[slice]


@dataclass(frozen=True, kw_only=True)
class MatrixPlan:
    """The part of this rank in gathering the matrices of one dtype, and in sending back the results.

    Attributes:
        numel: of the buffer of this rank's pieces.
        places: which elements of it each piece has, by its index among all of the rank's pieces.
        rounds: on all ranks equally many.
        travels: whether any rank sends anything.
        loads: the flops of each rank.
    """

    dtype: torch.dtype
    numel: int
    places: dict[int, slice]
    rounds: list[Round]
    travels: bool
    loads: list[int]


@dataclass(kw_only=True, eq=False)
class _Whole:
    """A matrix, and all non-empty parts of it: (the piece, where the part begins and ends in the piece)."""

    range: Segment
    rows: int
    columns: int
    flops: int
    parts: list[tuple[Holding, int, int]]

    @property
    def holders(self) -> list[int]:
        return sorted({holding.rank for holding, _, _ in self.parts})


def plan_matrices(
    matrices_of: Mapping[str, Matrices],  # by the name of the tensor
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
    """Choose an owner for each matrix, so that no rank has much more to compute than others. Adds to the loads.

    Longest processing time first (Graham 1969), which is at most a third above the best where every rank may own every matrix. Those
    with one candidate come before the others, which then fill what they leave.

    >>> choose_owners([3, 2, 2, 1], [[0, 1], [0, 1], [0, 1], [1]], [0, 0])
    [0, 1, 0, 1]
    """
    owners = [0] * len(flops)
    for index in sorted(range(len(flops)), key=lambda index: (len(candidates[index]) > 1, -flops[index])):
        owners[index] = min(candidates[index], key=loads.__getitem__)  # the first of several
        loads[owners[index]] += flops[index]
    return owners


def _plan(
    dtype: torch.dtype,
    wholes: Sequence[_Whole],
    pieces: Sequence[Holding],
    rank: int,
    loads: list[int],  # flops of each rank so far
    sent: list[int],  # elements that each rank sends so far
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
    """Split the matrices of each owner into rounds of at most ROUND_BYTES, the most expensive first; at least one matrix in each.

    Args:
        sizes: bytes of each matrix.

    Returns:
        The indices of the matrices in each round.
    """
    rounds: list[list[int]] = []
    filled: dict[int, tuple[int, int]] = {}  # of each owner: its last round, and the bytes there
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
    """Build this rank's part of a round. Two ranks send and receive elements for each other in the order of `members`."""
    gather, scatter = (AllToAll(sent=[0] * len(sent), received=[0] * len(sent)) for _ in range(2))
    outgoing: list[tuple[int, slice]] = []  # to whom
    incoming: list[tuple[int, slice]] = []  # from whom
    arriving: list[tuple[int, OwnedMatrix, Part]] = []  # from whom
    returning: list[tuple[int, OwnedMatrix, Part]] = []  # to whom
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
    """Describe the elements [begin, end) of a segment's buffer, which are at `at` in another buffer."""
    found = tuple(replace(each, source=each.source - begin) for each in overlaps(segment, whole.range))
    assert sum(each.run * each.count for each in found) == end - begin, "a range cuts a contiguous part out of a segment"
    return Part(at, at + end - begin, found)
