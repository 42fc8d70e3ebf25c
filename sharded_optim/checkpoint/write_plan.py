"""Plan which rank writes which chunks.

Each distinct element is written once. Chunks of replicas are divided among the ranks that hold them, so that all write about as much.
Segments are cut into chunks, which are hashed and read one by one. No rank knows the whole plan: for each tensor one rank, chosen by a hash
of its key, compares the segments of all ranks, and replies to each holder how many ranks hold the same segment. Used by `saving.py`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist

from sharded_optim.checkpoint.collectives import all_or_nothing
from sharded_optim.checkpoint.dtypes import dtype_named, name_of
from sharded_optim.checkpoint.errors import CheckpointError
from sharded_optim.checkpoint.local_tensor import LocalTensor, checksum
from sharded_optim.checkpoint.manifest import CHUNK_BYTES, TensorEntry, check_name, key_of
from sharded_optim.sharding.piece_exchange import HeldPiece, PieceExchange, RowText, attempt
from sharded_optim.sharding.ranks import gather_objects
from sharded_optim.sharding.row_exchange import Array
from sharded_optim.sharding.segment import Segment
from sharded_optim.storage.splitmix64 import GOLDEN, mix

__all__ = ["PlannedChunk", "TensorRow", "WritePlan", "plan_for", "rows_of"]

SEPARATOR = "\0"  # between kind and name in the keys that ranks exchange; no kind contains it
NEEDS_TEXT = 1  # flag of a reply: the checking rank needs the row's text (key, shape, dtype)
# Kinds of errors, in the order in which they are reported.
CONTRADICTS, DOES_NOT_TILE, VALUES_DIFFER = range(3)

# A `LocalTensor` as other ranks see it: kind, name, shape, dtype, the segment's start, run, stride and count, whether it is a buffer.
TensorRow = tuple[str, str, tuple[int, ...], str, int, int, int, int, bool]


@dataclass(frozen=True, kw_only=True)
class PlannedChunk:
    """A chunk to be written."""

    key: str  # of the tensor
    segment: Segment
    dtype: torch.dtype
    row: int  # index, on this rank, of the local tensor that the chunk is cut from
    offset: int  # index of the chunk's first element in the flattened local tensor

    @property
    def size(self) -> int:
        """The chunk's bytes in a file."""
        return self.segment.numel * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class WritePlan:
    """The tensors of a checkpoint, and the chunks that this rank writes.

    Attributes:
        tensors: all tensors of the checkpoint, by key, without chunks; in the same order on all ranks.
        chunks: the chunks that this rank writes, in the order of its shard file.
    """

    tensors: Mapping[str, TensorEntry]
    chunks: tuple[PlannedChunk, ...]


def rows_of(tensors: Iterable[LocalTensor]) -> list[TensorRow]:
    """Describe this rank's local tensors for the other ranks.

    Raises:
        ValueError: a tensor has a dtype, a name or a device (meta) that checkpoints cannot hold.
    """
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


# -------------------------------------------------------------------------------------------------------------- plans of a group


class _SingleProcess:
    """The key in `_plans` of a process without a group, as None cannot be weakly referenced."""


# The last plan of each group, and the digests of all ranks' rows, by which all ranks decide alike whether the plan is still valid.
_plans: WeakKeyDictionary[Any, tuple[Sequence[bytes], WritePlan]] = WeakKeyDictionary()


def plan_for(tensors: Sequence[LocalTensor], digests: Sequence[bytes], process_group: dist.ProcessGroup | None) -> WritePlan:
    """Plan which rank writes which chunks, or return the last plan if no rank's rows have changed. A collective.

    Args:
        tensors: this rank's tensors.
        digests: the digest of each rank's rows (see `rows_of`), by rank.

    Raises:
        CheckpointError: ranks disagree about a tensor, or their segments do not tile it; or replicas have different values, which is
            only checked when a new plan is made.
    """
    group = process_group or _SingleProcess
    if group not in _plans or _plans[group][0] != digests:
        _plans[group] = digests, _plan(tensors, process_group)
    return _plans[group][1]


def _plan(tensors: Sequence[LocalTensor], process_group: dist.ProcessGroup | None) -> WritePlan:
    pieces = [
        HeldPiece(f"{tensor.kind}{SEPARATOR}{tensor.segment.name}", tensor.segment, name_of(tensor.local.dtype, tensor.key))
        for tensor in tensors
    ]
    is_buffer = np.array([tensor.is_buffer for tensor in tensors], dtype=np.int64).reshape(-1, 1)
    exchange = PieceExchange(pieces, is_buffer, (), process_group)
    checks, problem = attempt(lambda: WriteChecks(exchange))
    sent = np.zeros((len(exchange.tensor), 4), dtype=np.int64) if checks is None else checks.replies
    replies = exchange.reply(sent)

    def compute() -> Array:
        checksums = np.zeros((len(tensors), 1), dtype=np.int64)
        for row in np.flatnonzero(replies[:, 1] > 1).tolist():
            if pieces[row].segment.numel:
                checksums[row] = checksum(tensors[row].flat())
        return checksums

    checksums, _ = all_or_nothing("comparing replicas", compute, process_group, share=lambda _: None)
    received = exchange.send(checksums)[:, 0]
    texts = exchange.texts(sent[:, 0] & NEEDS_TEXT != 0, replies[:, 0] & NEEDS_TEXT != 0)
    checked, problem = attempt(lambda: (checks.failure(received, texts), checks.tensors(texts))) if checks is not None else (None, problem)
    of_ranks = gather_objects(((-1, -1, -1, problem), []) if checked is None else checked, process_group)
    failures = [failed for failed, _ in of_ranks if failed is not None]
    if failures:
        raise CheckpointError(min(failures)[-1])
    planned: dict[str, TensorEntry] = {}
    for _, _, text in sorted(tensor for _, checked in of_ranks for tensor in checked):
        kind, _, name = text.key.partition(SEPARATOR)
        planned[_key(text)] = TensorEntry(kind=kind, name=name, shape=text.shape, dtype=dtype_named(text.dtype), chunks=())
    return WritePlan(tensors=planned, chunks=_own_chunks(pieces, replies))


class WriteChecks:
    """Checks the tensors that are assigned to this rank, by comparing their pieces on all ranks.

    Attributes:
        replies: int64 (rows, 4), for the holder of each row: flags; the number of ranks that may write the segment, 0 if only another rank
            may (buffers); the index of this holder among these ranks; a hash of these ranks.
    """

    def __init__(self, exchange: PieceExchange) -> None:
        self._exchange = exchange
        self._errors = exchange.tiling_errors()
        self._first = exchange.first_of_segment[exchange.segment]
        number = np.arange(len(exchange.tensor))
        writes = (exchange.further[:, 0] == 0) | (self._first == number)  # of a buffer, only the first holder, whose values are saved
        self.replies = np.zeros((len(exchange.tensor), 4), dtype=np.int64)
        order = np.flatnonzero(writes)
        order = order[np.argsort(exchange.segment[order], kind="stable")]
        segment = exchange.segment[order]
        count = np.bincount(segment, minlength=len(exchange.first_of_segment))
        begin = np.cumsum(count) - count
        position = np.arange(len(order)) - begin[segment]
        mixed = mix(torch.from_numpy(exchange.ranks[order] * GOLDEN) + mix(torch.from_numpy(position + 1))).numpy()
        holders = np.zeros(len(count), dtype=np.int64)
        np.add.at(holders, segment, mixed)
        self.replies[order, 1:] = np.column_stack([count[segment], position, holders[segment]])
        self.replies[exchange.first_of_tensor, 0] = NEEDS_TEXT
        self._contradicting = np.flatnonzero(exchange.contradicts)[:1].tolist()
        self.replies[self._contradicting, 0] = NEEDS_TEXT

    def tensors(self, texts: Mapping[int, RowText]) -> list[tuple[int, int, RowText]]:
        """Return each tensor: the rank and index of its first piece, by which all ranks sort the tensors, and its text."""
        return [(*self._rank_and_index(row), texts[row]) for row in self._exchange.first_of_tensor.tolist()]

    def failure(
        self,
        checksums: Array,  # int64 (rows,), CRC-32 of the values
        texts: Mapping[int, RowText],
    ) -> tuple[int, int, int, str] | None:
        """Return the first error: kind, rank and index of the piece, by which all ranks' errors are sorted, and message; None: no error."""
        ranks, first = self._exchange.ranks, self._exchange.first_of_tensor
        for row in self._contradicting:
            one, other = texts[int(first[self._exchange.tensor[row]])], texts[row]
            message = (
                f"{_key(one)!r} has shape {one.shape} and {dtype_named(one.dtype)} on one rank, and shape {other.shape} and "
                f"{dtype_named(other.dtype)} on rank {ranks[row]}; different tensors need different names"
            )
            return CONTRADICTS, *self._rank_and_index(row), message
        for tensor, problem in self._errors.items():
            row = int(first[tensor])
            message = (
                f"what the ranks hold of {_key(texts[row])!r} (shape {texts[row].shape}) does not tile it: {problem}; save from "
                f"all ranks that hold a part, with the wrapped model and its optimizer"
            )
            return DOES_NOT_TILE, *self._rank_and_index(row), message
        for row in np.flatnonzero((self.replies[:, 1] > 1) & (checksums != checksums[self._first])).tolist():
            key = _key(texts[int(first[self._exchange.tensor[row]])])
            message = (
                f"ranks {ranks[self._first[row]]} and {ranks[row]} both hold {key!r}, with different values: they are not replicas of one "
                f"tensor. If they should be, broadcast them from one rank; if they are different tensors (stages of a pipeline, experts), "
                f"give them different names; if the ranks train apart, save with process_group= of those that train together"
            )
            return VALUES_DIFFER, *self._rank_and_index(row), message
        return None

    def _rank_and_index(self, row: int) -> tuple[int, int]:
        return int(self._exchange.ranks[row]), int(self._exchange.index[row])


def _key(tensor: RowText | HeldPiece) -> str:
    """Return the key of a tensor in the checkpoint."""
    kind, _, name = tensor.key.partition(SEPARATOR)
    return key_of(kind, name)


def _own_chunks(
    pieces: Sequence[HeldPiece],
    replies: Array,  # int64 (pieces, 4), see `WriteChecks`
) -> tuple[PlannedChunk, ...]:
    """Choose the chunks that this rank writes: all chunks of segments that no other rank may write, some of the others.

    All ranks that hold the same segments assign their chunks by one rule: from the largest segment on, the rank that has the fewest bytes
    so far takes the next chunk.
    """
    chunks: list[PlannedChunk] = []
    # By hash and number of the ranks that hold a piece: for each piece, the index of this rank among them -> its row.
    shared: dict[tuple[int, int], dict[HeldPiece, dict[int, int]]] = {}
    for row, (piece, (_, count, number, holders)) in enumerate(zip(pieces, replies.tolist(), strict=True)):
        if count == 1:
            chunks += _cut(piece, row)
        elif count and piece.segment.numel:
            shared.setdefault((holders, count), {}).setdefault(piece, {})[number] = row
    for (holders, count), of_piece in shared.items():
        # Ties are broken by the hash of the holders, so that the first rank does not write the first chunk of every set of holders.
        loads = [(0, (number + holders) % count, number) for number in range(count)]
        heapq.heapify(loads)
        for piece in sorted(of_piece, key=_largest_first):
            for chunk in _cut(piece, 0):
                load, order, number = loads[0]
                heapq.heapreplace(loads, (load + chunk.size, order, number))
                if number in of_piece[piece]:
                    chunks.append(replace(chunk, row=of_piece[piece][number]))
    # Widest dtypes first: each chunk is then aligned to its dtype.
    return tuple(sorted(chunks, key=lambda chunk: (-chunk.dtype.itemsize, chunk.row, chunk.offset)))


def _largest_first(piece: HeldPiece) -> tuple[int, str, int, int]:
    segment = piece.segment
    return -segment.numel * dtype_named(piece.dtype).itemsize, piece.key, segment.start, segment.run


def _cut(piece: HeldPiece, row: int) -> Iterator[PlannedChunk]:
    key, dtype, offset = _key(piece), dtype_named(piece.dtype), 0
    for part in piece.segment.cut(CHUNK_BYTES // dtype.itemsize):
        yield PlannedChunk(key=key, segment=part, dtype=dtype, row=row, offset=offset)
        offset += part.numel
