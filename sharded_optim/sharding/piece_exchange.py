"""Exchange the pieces of tensors that ranks hold: each rank checks some of the tensors, and receives their pieces from all ranks.

A piece is sent as a row of numbers: a hash of the tensor's key, a hash of its shape and dtype, and the extents of its segment. The text of
a row (key, shape, dtype) is sent only where it is needed: once for each tensor, and for pieces that contradict each other.

`exchange.py` uses it to choose the owners of pieces, and `checkpoint/write_plan.py` to choose the writers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from sharded_optim.sharding.ranks import message_of
from sharded_optim.sharding.row_exchange import Array, RowExchange, hash_words
from sharded_optim.sharding.segment import Segment, find_tiling_error_of

__all__ = ["HeldPiece", "PieceExchange", "RowText", "attempt", "group_rows"]

T = TypeVar("T")

# Columns of a row; the columns of `further` follow.
KEY = slice(0, 2)
TRAITS = 2
EXTENTS = slice(3, 7)  # start, run, stride, count
NUMEL, TEXT_SIZE, INDEX = 7, 8, 9
COLUMNS = 10


class HeldPiece(NamedTuple):
    """A piece that this rank holds."""

    key: str  # identifies the tensor; the same on all ranks
    segment: Segment
    dtype: str


class RowText(NamedTuple):
    """The text of a row: what its hashes stand for."""

    key: str
    shape: tuple[int, ...]
    dtype: str


class PieceExchange(RowExchange):
    """All ranks' pieces of the tensors that this rank checks: a row for each, by holding rank, and in the order of the holder's pieces.

    Construction, `send`, `reply` and `texts` are collectives; see `RowExchange`. Tensors and distinct segments are numbered in the order in
    which they first appear.

    Args:
        pieces: this rank's pieces.
        further: int64 (pieces, k), k more numbers for each piece.
        facts: numbers that this rank sends to all others.
        process_group: the ranks; None: this process is alone.

    Attributes:
        index: int64 (rows,), the index of the piece among those of the rank that holds it.
        extents: int64 (rows, 4), start, run, stride and count of the piece's segment.
        further: int64 (rows, k), the further numbers of the piece.
        tensor, segment: int64 (rows,), the numbers of the piece's tensor and segment.
        first_of_tensor, first_of_segment: the first row of each tensor, and of each segment.
    """

    def __init__(self, pieces: Sequence[HeldPiece], further: Array, facts: Sequence[int], process_group: dist.ProcessGroup | None) -> None:
        keys = [piece.key.encode("utf-8", "surrogatepass") for piece in pieces]
        kinds = {(segment.shape, dtype) for _, segment, dtype in pieces}
        traits = {(shape, dtype): f"{','.join(map(str, shape))} {dtype} ".encode() for shape, dtype in kinds}  # `_parse` reads it
        of_traits = dict(zip(traits, hash_words(list(traits.values()))[:, 0].tolist(), strict=True))
        self._texts = [traits[piece.segment.shape, piece.dtype] + key for piece, key in zip(pieces, keys, strict=True)]
        rows = np.empty((len(pieces), COLUMNS + further.shape[1]), dtype=np.int64)
        rows[:, KEY] = hash_words(keys)
        rows[:, TRAITS:INDEX] = np.array(
            [
                (of_traits[each.shape, dtype], each.start, each.run, each.stride, each.count, each.tensor_numel, len(text))
                for (_, each, dtype), text in zip(pieces, self._texts, strict=True)
            ],
            dtype=np.int64,
        ).reshape(len(pieces), INDEX - TRAITS)
        rows[:, INDEX] = np.arange(len(pieces))
        rows[:, COLUMNS:] = further
        world_size = 1 if process_group is None else dist.get_world_size(process_group)
        to = (rows[:, 0].view(np.uint64) % np.uint64(world_size)).astype(np.int64)
        super().__init__(rows, to, facts, process_group)
        self.index, self.extents, self.further = self.rows[:, INDEX], self.rows[:, EXTENTS], self.rows[:, COLUMNS:]
        self.tensor, self.first_of_tensor = group_rows(self.rows[:, KEY])
        self.segment, self.first_of_segment = group_rows(np.column_stack([self.tensor, self.extents]))

    @property
    def numels(self) -> Array:
        """The number of elements of each tensor: int64 (tensors,)."""
        return self.rows[self.first_of_tensor, NUMEL]

    @cached_property
    def contradicts(self) -> Array:
        """Whether shape or dtype differ from those in the first row of the tensor: bool (rows,)."""
        traits = self.rows[:, TRAITS]
        return traits != traits[self.first_of_tensor[self.tensor]]

    def texts(
        self,
        of_rows: Array,  # bool (rows,): whether this rank needs the row's text
        of_pieces: Array,  # bool (pieces,): whether the rank that checks the piece needs its text, by that rank's reply
    ) -> dict[int, RowText]:  # by row
        sent = [text if needed else b"" for text, needed in zip(self._texts, of_pieces.tolist(), strict=True)]
        received = self.send_texts(sent, np.where(of_rows, self.rows[:, TEXT_SIZE], 0))
        return {row: _parse(received[row]) for row in np.flatnonzero(of_rows).tolist()}

    def tiling_errors(self) -> dict[int, str]:
        """Return an error, by tensor number, for each tensor whose distinct segments do not cover each element exactly once.

        Tensors about whose shape ranks disagree are left out.
        """
        filled = self.first_of_segment[self.extents[self.first_of_segment, 1] > 0]  # empty segments are all zeros
        tensor, (start, run, _, count) = self.tensor[filled], self.extents[filled].T
        order = np.lexsort((start, tensor))
        tensor, start, end, count = tensor[order], start[order], (start + run)[order], count[order]
        is_last = np.append(tensor[1:] != tensor[:-1], True)[: len(tensor)]
        is_first = np.append(True, is_last[:-1])[: len(tensor)]
        numels = self.numels
        follows = start == np.where(is_first, 0, np.append(0, end[:-1])[: len(tensor)])
        tiles = numels == 0
        tiles[tensor] = True
        # Fast path: single runs that follow each other without a gap. All other tensors are checked by `find_tiling_error_of`.
        np.logical_and.at(tiles, tensor, follows & (count == 1) & (~is_last | (end == numels[tensor])))
        tiles[self.tensor[self.contradicts]] = True
        errors: dict[int, str] = {}
        for number in np.flatnonzero(~tiles).tolist():
            fields = self.extents[filled[order[tensor == number]]]
            problem = find_tiling_error_of(torch.from_numpy(np.ascontiguousarray(fields)), int(numels[number]))
            if problem:
                errors[number] = problem
        return errors


def attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """Call a function between collectives. Return (result, None), or (None, text of its error), which all ranks then raise together."""
    try:
        return action(), None
    except Exception as error:  # the other ranks must get the error before this one raises
        return None, message_of(error)


def group_rows(
    columns: Array,  # int64 (rows, k)
) -> tuple[Array, Array]:  # int64 (rows,), (groups,)
    """Number equal rows in the order in which they first appear.

    Returns:
        The number of each row, and the first row of each number.
    """
    order = np.lexsort(columns.T[::-1])  # stable
    in_order = columns[order]
    begins = np.append(True, (in_order[1:] != in_order[:-1]).any(axis=1))[: len(order)]
    first = order[begins]
    number = np.empty_like(order)
    by_appearance = np.argsort(first)
    number[order] = np.argsort(by_appearance)[np.cumsum(begins) - 1]
    return number, first[by_appearance]


def _parse(text: bytes) -> RowText:
    shape, dtype, key = text.decode("utf-8", "surrogatepass").split(" ", 2)
    return RowText(key, tuple(int(size) for size in shape.split(",") if size), dtype)
