"""The tensors that a backend is given: columns, their addresses in memory, and the division of work."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from sharded_optim.sharding.segment import Segment
from sharded_optim.storage.format import Format
from sharded_optim.storage.formats import format_of

__all__ = ["Column", "OperandTables", "Operands", "addresses_of"]


class Column:
    """One tensor of each of several parameters: equal dtypes and devices, any shapes and strides.

    Attributes:
        wholes: the tensors that these are, or, where a wrapper flattens, are pieces of.
        dtype: of all of them.
        addresses: of the memory of each: int64.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.wholes: Sequence[Tensor] = ()
        self.dtype = tensors[0].dtype
        self.renew(tensors, addresses_of(tensors))

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The tensors. Their shapes, strides and dtype never change; their memory may, between two calls of a backend."""
        return self.wholes

    def renew(self, wholes: Sequence[Tensor], addresses: array[int]) -> None:
        """Replace the tensors by others of the same shapes, strides and dtype, at these addresses."""
        self.wholes, self.addresses = wholes, addresses

    def release(self) -> None:
        """Release the tensors, so that their memory can be freed."""
        self.wholes = ()


def addresses_of(tensors: Iterable[Tensor]) -> array[int]:
    return array("q", list(map(Tensor.data_ptr, tensors)))  # a third faster than without the list


@dataclass(kw_only=True, eq=False)
class Operands:
    """The tensors of one call of a backend, column by column: pieces of parameters, all in the same formats.

    Attributes:
        derived: what backends derive from shapes, strides, dtypes and segments, by backend.
    """

    segments: Sequence[Segment]  # which elements of which tensor each parameter's are, in row-major order
    format: Format  # how the parameters are stored
    param: Column  # written by update
    extra: tuple[Column, ...]  # the further arrays of the format; written by update
    grad: Column  # in the plain format of its dtype; read-only
    state_formats: tuple[Format, ...]  # how each of Algorithm.state is stored
    state: tuple[Column, ...]  # the arrays of the first of them, of the second, ...; written by update

    def __post_init__(self) -> None:
        self.device = self.param.wholes[0].device
        self.grad_format = format_of(self.grad.dtype)
        self.formats = (self.format, *self.state_formats)  # of the parameters and of each of their moments: what an update stores
        self.written = (self.param, *self.extra, *self.state)  # the arrays of each of these formats
        self.derived: dict[Any, Any] = {}

    @classmethod
    def whole(cls, params: Sequence[Tensor], grads: Sequence[Tensor], state: Sequence[Sequence[Tensor]]) -> Operands:
        """Build operands of whole tensors, in the plain formats of their dtypes."""
        columns = tuple(map(Column, state))
        return cls(
            segments=[Segment.whole("param", param.shape) for param in params],
            format=format_of(params[0].dtype),
            param=Column(params),
            extra=(),
            grad=Column(grads),
            state_formats=tuple(format_of(column.dtype) for column in columns),
            state=columns,
        )

    def __len__(self) -> int:
        return len(self.segments)


class OperandTables:
    """Tables for compiled kernels, on the CPU, that follow from shapes, strides and segments.

    Args:
        operands: which.
        chunk: the most elements of an item of work.

    Attributes:
        elements: their number.
        work: int64 (items, 3): operand, first element, number of elements.
        runs: int64 (operands, 3): start, run and stride of each segment, for formats that draw random numbers.
    """

    def __init__(self, operands: Operands, chunk: int) -> None:
        columns = [column.tensors for column in (*operands.written, operands.grad)]
        shapes = [[tensor.shape for tensor in column] for column in columns]
        assert all(each == shapes[0] for each in shapes), "kernels would read and write beyond the smallest"
        counts = torch.tensor([tensor.numel() for tensor in operands.param.tensors], dtype=torch.int64, device="cpu")
        items = (counts + chunk - 1) // chunk
        rows = torch.arange(len(counts), device="cpu").repeat_interleave(items)
        first = (torch.arange(len(rows), device="cpu") - (items.cumsum(0) - items)[rows]) * chunk
        self.elements = int(counts.sum())
        self.work = torch.stack([rows, first, (counts[rows] - first).clamp(max=chunk)], dim=1)
        self.runs = torch.tensor(
            [(each.start, max(each.run, 1), each.stride) for each in operands.segments], dtype=torch.int64, device="cpu"
        )
        ordered = any(fmt.is_random for fmt in operands.formats)
        all_contiguous = all(all(map(Tensor.is_contiguous, column)) for column in columns)
        rows_of_tensors = [] if all_contiguous else enumerate(zip(*columns, strict=True))
        self._scattered = [row for row, tensors in rows_of_tensors if not _lie_alike(tensors, ordered=ordered)]

    def addresses(self, columns: Sequence[Column]) -> tuple[bytes, dict[tuple[int, int], Tensor]]:
        """Return the addresses of contiguous elements of each column, those of a row in the same order.

        Returns:
            addresses: int64 (columns, operands).
            copies: (column, row) of the tensors that had to be copied for that, and the copies, which must live until they are used.
        """
        found = list(map(attrgetter("addresses"), columns))
        copies = {}
        if self._scattered:
            found = [array("q", each) for each in found]
            for index, column in enumerate(columns):
                for row in self._scattered:
                    copy = column.tensors[row].contiguous()
                    if copy is not column.tensors[row]:
                        copies[index, row] = copy
                        found[index][row] = copy.data_ptr()
        return b"".join(found), copies


def _lie_alike(tensors: Sequence[Tensor], *, ordered: bool) -> bool:
    """Return whether all tensors lie in memory in the same order and without gaps, with `ordered` in row-major order."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return True
    shape, strides = tensors[0].shape, tensors[0].stride()
    span = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    return not ordered and span == shape.numel() and min(strides) > 0 and all(tensor.stride() == strides for tensor in tensors)
