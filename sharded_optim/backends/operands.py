"""The arguments of a backend call: columns of tensors, their addresses in memory, and the division into work items."""

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
    """One tensor of each of several parameters: the same dtype and device, any shapes and strides.

    Attributes:
        wholes: the local tensors; if a wrapper flattens, `tensors` are pieces of them, otherwise the same.
        dtype: the common dtype.
        addresses: memory address of each of `tensors`: int64.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.wholes: Sequence[Tensor] = ()
        self.dtype = tensors[0].dtype
        self.renew(tensors, addresses_of(tensors))

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The tensors. Their shapes, strides and dtype never change; their memory may change between two calls of a backend."""
        return self.wholes

    def renew(self, wholes: Sequence[Tensor], addresses: array[int]) -> None:
        """Replace the local tensors by others with the same shapes, strides and dtype, at these addresses."""
        self.wholes, self.addresses = wholes, addresses

    def release(self) -> None:
        """Release the references to the tensors, so that their memory can be freed."""
        self.wholes = ()


def addresses_of(tensors: Iterable[Tensor]) -> array[int]:
    return array("q", list(map(Tensor.data_ptr, tensors)))  # a third faster than without the list


@dataclass(kw_only=True, eq=False)
class Operands:
    """The tensors of one call of a backend, column by column: pieces of parameters, all in the same formats.

    Attributes:
        grad_format: storage format of the gradients.
        formats: storage formats of the values that an update stores: the parameter, then each moment.
        written: the arrays of these formats, in order.
        derived: caches of backends, derived from shapes, strides, dtypes and segments; keyed by backend.
    """

    segments: Sequence[Segment]  # the elements of a tensor that each operand consists of, in row-major order
    format: Format  # storage format of the parameters
    param: Column  # first array of the format; written by update
    extra: tuple[Column, ...]  # extra arrays of the format; written by update
    grad: Column  # in the plain format of its dtype; read-only
    state_formats: tuple[Format, ...]  # storage format of each moment in Algorithm.state
    state: tuple[Column, ...]  # the arrays of the first moment, of the second, ...; written by update

    def __post_init__(self) -> None:
        self.device = self.param.wholes[0].device
        self.grad_format = format_of(self.grad.dtype)
        self.formats = (self.format, *self.state_formats)
        self.written = (self.param, *self.extra, *self.state)
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
    """Tables for compiled kernels, on the CPU, derived from shapes, strides and segments of operands.

    Args:
        operands: the operands of the kernel.
        chunk: largest number of elements of a work item.

    Attributes:
        elements: total number of elements.
        work: work items: int64 (items, 3): operand, first element, number of elements.
        runs: start, run and stride of each segment, for formats that draw random numbers: int64 (operands, 3).
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
        """Return addresses at which the tensors of an operand are dense and in the same element order, copying tensors if necessary.

        Returns:
            addresses: int64 (columns, operands), as bytes.
            copies: contiguous copies, keyed by (column, row) of the tensor; they must stay alive until the kernel has run.
        """
        addresses = list(map(attrgetter("addresses"), columns))
        copies = {}
        if self._scattered:
            addresses = [array("q", each) for each in addresses]
            for index, column in enumerate(columns):
                for row in self._scattered:
                    copy = column.tensors[row].contiguous()
                    if copy is not column.tensors[row]:
                        copies[index, row] = copy
                        addresses[index][row] = copy.data_ptr()
        return b"".join(addresses), copies


def _lie_alike(tensors: Sequence[Tensor], *, ordered: bool) -> bool:
    """Return whether all tensors are dense in memory and in the same element order; with `ordered`, in row-major order."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return True
    shape, strides = tensors[0].shape, tensors[0].stride()
    span = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    return not ordered and span == shape.numel() and min(strides) > 0 and all(tensor.stride() == strides for tensor in tensors)
