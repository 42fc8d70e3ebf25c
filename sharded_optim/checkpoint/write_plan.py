"""Which rank writes which chunks. Every rank computes the same plan from the descriptions of what all ranks hold.

Each distinct element is written once. Replicas are spread over the ranks that hold them, so that all write about as much. Segments are cut
into chunks, which are hashed and read one by one. Used by `saving.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from sharded_optim.checkpoint.collectives import all_or_nothing, gather_distinct, rank_and_world_size
from sharded_optim.checkpoint.dtypes import dtype_named, name_of
from sharded_optim.checkpoint.errors import CheckpointError
from sharded_optim.checkpoint.local_tensor import LocalTensor, checksum
from sharded_optim.checkpoint.manifest import CHUNK_BYTES, check_name, key_of
from sharded_optim.sharding.segment import Segment, find_tiling_error

__all__ = ["PlannedChunk", "TensorRow", "WritePlan", "plan_for", "rows_of"]

# A `LocalTensor` as other ranks see it: kind, name, shape, dtype, the segment's start, run, stride and count, whether it is a buffer.
TensorRow = tuple[str, str, tuple[int, ...], str, int, int, int, int, bool]
Holder = tuple[int, int]  # a rank, and the number of the row there


@dataclass(frozen=True, kw_only=True)
class PlannedChunk:
    """A chunk to be written."""

    kind: str
    segment: Segment
    dtype: torch.dtype
    row: int  # number of the writer's local tensor that it is cut from
    offset: int  # of its first element, in that tensor's elements

    @property
    def size(self) -> int:
        """Bytes."""
        return self.segment.numel * self.dtype.itemsize

    @property
    def key(self) -> str:
        return key_of(self.kind, self.segment.name)


@dataclass(frozen=True, kw_only=True)
class WritePlan:
    """What every rank writes.

    Attributes:
        tensors: shape and dtype of every tensor, by kind and name.
        chunks: of each rank, in the order of its file.
        replicas: the key of each segment that several ranks hold, without buffers, and its holders.
    """

    tensors: dict[tuple[str, str], tuple[tuple[int, ...], torch.dtype]]
    chunks: tuple[tuple[PlannedChunk, ...], ...]
    replicas: tuple[tuple[str, tuple[Holder, ...]], ...]

    @classmethod
    def of(cls, tables: Sequence[Sequence[TensorRow]]) -> WritePlan:
        """Plan for the rows of all ranks.

        Raises:
            CheckpointError: ranks disagree about a tensor, or what they hold does not tile it.
        """
        tensors: dict[tuple[str, str], tuple[tuple[int, ...], torch.dtype]] = {}
        holders: dict[tuple[str, Segment], list[Holder]] = {}
        for rank, rows in enumerate(tables):
            for number, (kind, name, shape, dtype_name, start, run, stride, count, is_buffer) in enumerate(rows):
                dtype = dtype_named(dtype_name)
                known = tensors.setdefault((kind, name), (shape, dtype))
                if known != (shape, dtype):
                    raise CheckpointError(
                        f"{key_of(kind, name)!r} has shape {known[0]} and {known[1]} on one rank, and shape {shape} and {dtype} on rank "
                        f"{rank}; different tensors need different names"
                    )
                segment = Segment(name=name, shape=shape, start=start, run=run, stride=stride, count=count)
                of_segment = holders.setdefault((kind, segment), [])
                if not (of_segment and is_buffer):
                    of_segment.append((rank, number))
        _check_tiling(holders)
        replicas = tuple(
            (key_of(kind, segment.name), tuple(of_segment))
            for (kind, segment), of_segment in holders.items()
            if len(of_segment) > 1 and segment.numel
        )
        return cls(tensors=tensors, chunks=_assign(holders, tensors, len(tables)), replicas=replicas)


def _check_tiling(holders: Iterable[tuple[str, Segment]]) -> None:
    segments: dict[tuple[str, str], list[Segment]] = {}
    for kind, segment in holders:
        segments.setdefault((kind, segment.name), []).append(segment)
    for (kind, name), distinct in segments.items():
        problem = find_tiling_error(distinct)
        if problem:
            raise CheckpointError(
                f"what the ranks hold of {key_of(kind, name)!r} (shape {distinct[0].shape}) does not tile it: {problem}; save from "
                f"all ranks that hold a part, with the wrapped model and its optimizer"
            )


def _assign(
    holders: dict[tuple[str, Segment], list[Holder]],
    tensors: dict[tuple[str, str], tuple[tuple[int, ...], torch.dtype]],
    world_size: int,
) -> tuple[tuple[PlannedChunk, ...], ...]:
    """Assign chunks to ranks: those with one holder first; of the others, the holder with the least to write takes the next."""
    chunks: list[list[PlannedChunk]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    for (kind, segment), of_segment in sorted(holders.items(), key=lambda item: len(item[1])):
        dtype = tensors[kind, segment.name][1]
        offset = 0
        for part in segment.cut(CHUNK_BYTES // dtype.itemsize):
            rank, row = min(of_segment, key=lambda holder: load[holder[0]])
            chunk = PlannedChunk(kind=kind, segment=part, dtype=dtype, row=row, offset=offset)
            chunks[rank].append(chunk)
            load[rank] += chunk.size
            offset += part.numel
    # Wide elements first: each chunk is then aligned to its own.
    return tuple(tuple(sorted(own, key=lambda chunk: -chunk.dtype.itemsize)) for own in chunks)


def rows_of(tensors: Iterable[LocalTensor]) -> list[TensorRow]:
    """Describe what this rank holds, for the other ranks."""
    rows = []
    for tensor in tensors:
        segment = tensor.segment
        dtype = name_of(tensor.local.dtype, tensor.key)
        check_name(segment.name)
        if tensor.local.is_meta:
            raise ValueError(f"{tensor.key!r} has no memory (device meta); materialize the model before it is saved")
        extent = (segment.start, segment.run, segment.stride, segment.count)
        rows.append((tensor.kind, segment.name, segment.shape, dtype, *extent, tensor.is_buffer))
    return rows


# -------------------------------------------------------------------------------------------------------------- of a process group


class _SingleProcess:
    """The key of plans for a process without a group."""


_SINGLE_PROCESS = _SingleProcess()
# The last plan of each group, with the digests of all ranks' rows: whether it still holds is the same on all ranks.
_plans: WeakKeyDictionary[Any, tuple[Sequence[bytes], WritePlan]] = WeakKeyDictionary()


def plan_for(
    tensors: Sequence[LocalTensor], rows: Sequence[TensorRow], digests: Sequence[bytes], process_group: dist.ProcessGroup | None
) -> WritePlan:
    """Plan the write of what all ranks hold, or return the last plan if that has not changed. A collective.

    Args:
        tensors, rows: this rank's.
        digests: of the rows of all ranks.

    Raises:
        CheckpointError: see `WritePlan.of`; or replicas have different values, which is checked when a plan is made.
    """
    group = process_group or _SINGLE_PROCESS
    if group not in _plans or _plans[group][0] != digests:
        plan = WritePlan.of(gather_distinct(rows, digests, process_group))
        if plan.replicas:
            _compare_replicas(plan, tensors, process_group)
        _plans[group] = digests, plan
    return _plans[group][1]


def _compare_replicas(plan: WritePlan, tensors: Sequence[LocalTensor], process_group: dist.ProcessGroup | None) -> None:
    """Refuse different tensors with one name on several ranks: only one of them would be saved. A collective."""
    rank, _ = rank_and_world_size(process_group)

    def compute() -> dict[int, int]:
        own = [row for _, holders in plan.replicas for holder, row in holders if holder == rank]
        return {row: checksum(tensors[row].flat()) for row in own}

    _, checksums = all_or_nothing("comparing replicas", compute, process_group)
    for key, ((first, row), *others) in plan.replicas:
        for other, its_row in others:
            if checksums[other][its_row] != checksums[first][row]:
                raise CheckpointError(
                    f"ranks {first} and {other} both hold {key!r}, with different values: they are not replicas of one tensor. If they "
                    f"should be, broadcast them from one rank; if they are different tensors (stages of a pipeline, experts), give them "
                    f"different names; if the ranks train apart, save with process_group= of those that train together"
                )
