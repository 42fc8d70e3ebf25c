"""Who writes what. Every rank computes the same plan from what all ranks hold.

Each distinct element is written once. What several ranks hold (replicas) is spread over them, so that all write about as much. Segments are
cut into chunks, which are hashed and read one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from sharded_optim.checkpoint.dtypes import dtype_named, name_of
from sharded_optim.checkpoint.errors import CheckpointError
from sharded_optim.checkpoint.held import Held
from sharded_optim.checkpoint.manifest import CHUNK_BYTES, check_text, key_of
from sharded_optim.sharding.segment import Segment, find_tiling_error

__all__ = ["Part", "Plan", "Row", "rows_of"]

# What one rank holds of one tensor: kind, name, shape, dtype, the segment's start, run, stride and count, and whether it is a buffer.
Row = tuple[str, str, tuple[int, ...], str, int, int, int, int, bool]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A chunk that is going to be written."""

    kind: str
    segment: Segment
    dtype: torch.dtype
    row: int  # of the writer's own: what it is a part of
    offset: int  # of its first element, in the elements of that

    @property
    def size(self) -> int:
        """Bytes."""
        return self.segment.numel * self.dtype.itemsize

    @property
    def key(self) -> str:
        return key_of(self.kind, self.segment.name)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every rank writes.

    Attributes:
        tensors: shape and dtype of all, by kind and name.
        parts: of each rank, in the order of its file.
        replicas: the key of what several ranks hold the same elements of, but for buffers, and (rank, row) of each of these.
    """

    tensors: dict[tuple[str, str], tuple[tuple[int, ...], torch.dtype]]
    parts: tuple[tuple[Part, ...], ...]
    replicas: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]

    @classmethod
    def of(cls, tables: Sequence[Sequence[Row]]) -> Plan:
        """Of what each rank holds.

        Raises:
            CheckpointError: ranks disagree about a tensor, or what they hold does not tile it.
        """
        tensors: dict[tuple[str, str], tuple[tuple[int, ...], torch.dtype]] = {}
        holders: dict[tuple[str, Segment], list[tuple[int, int]]] = {}  # (rank, row) of all who hold a segment
        segments: dict[tuple[str, str], list[Segment]] = {}
        for rank, table in enumerate(tables):
            for number, (kind, name, shape, dtype_name, start, run, stride, count, is_buffer) in enumerate(table):
                dtype = dtype_named(dtype_name)
                segment = Segment(name=name, shape=shape, start=start, run=run, stride=stride, count=count)
                known = tensors.setdefault((kind, name), (shape, dtype))
                if known != (shape, dtype):
                    raise CheckpointError(
                        f"{key_of(kind, name)!r} has shape {known[0]} and {known[1]} on one rank, and shape {shape} and {dtype} on rank "
                        f"{rank}; different tensors need different names"
                    )
                found = holders.setdefault((kind, segment), [])
                if not found:
                    segments.setdefault((kind, name), []).append(segment)
                if not (found and is_buffer):
                    found.append((rank, number))
        for (kind, name), distinct in segments.items():
            problem = find_tiling_error(distinct)
            if problem:
                raise CheckpointError(
                    f"what the ranks hold of {key_of(kind, name)!r} (shape {distinct[0].shape}) does not tile it: {problem}; save from "
                    f"all ranks that hold a part, with the wrapped model and its optimizer"
                )
        replicas = tuple(
            (key_of(kind, segment.name), tuple(found)) for (kind, segment), found in holders.items() if len(found) > 1 and segment.numel
        )
        return cls(tensors=tensors, parts=_assign(holders, tensors, len(tables)), replicas=replicas)


def _assign(
    holders: dict[tuple[str, Segment], list[tuple[int, int]]],
    tensors: dict[tuple[str, str], tuple[tuple[int, ...], torch.dtype]],
    ranks: int,
) -> tuple[tuple[Part, ...], ...]:
    """What only one rank holds is its own; of the rest, the one that has least to write takes the next chunk."""
    parts: list[list[Part]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for (kind, segment), found in sorted(holders.items(), key=lambda item: len(item[1])):
        dtype = tensors[kind, segment.name][1]
        offset = 0
        for chunk in segment.cut(CHUNK_BYTES // dtype.itemsize):
            rank, row = min(found, key=lambda holder: load[holder[0]])
            part = Part(kind=kind, segment=chunk, dtype=dtype, row=row, offset=offset)
            parts[rank].append(part)
            load[rank] += part.size
            offset += chunk.numel
    # Wide elements first: each chunk is then aligned to its own.
    return tuple(tuple(sorted(own, key=lambda part: -part.dtype.itemsize)) for own in parts)


def rows_of(held: Iterable[Held]) -> list[Row]:
    """What this rank holds, as it tells the others."""
    rows = []
    for each in held:
        segment = each.segment
        dtype = name_of(each.local.dtype, each.key)
        check_text(segment.name)
        if each.local.is_meta:
            raise ValueError(f"{each.key!r} has no memory (device meta); materialize the model before it is saved")
        extent = (segment.start, segment.run, segment.stride, segment.count)
        rows.append((each.kind, segment.name, segment.shape, dtype, *extent, each.is_buffer))
    return rows
