"""What compiled kernels need to know of operands besides their values: where they lie, and how to divide the work."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_optim.backends import Column, Operands

__all__ = ["OperandTables"]


class OperandTables:
    """What follows from the shapes, strides and segments of operands, as tables on the CPU.

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
        rows_of_tensors = list(zip(*columns, strict=True))
        for tensors in rows_of_tensors:
            assert len({tensor.shape for tensor in tensors}) == 1, "kernels would read and write beyond the smallest"
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
        self._scattered = [row for row, tensors in enumerate(rows_of_tensors) if not _lie_alike(tensors, ordered=ordered)]

    def addresses(self, columns: Sequence[Column]) -> tuple[bytes, dict[tuple[int, int], Tensor]]:
        """Where the elements of each column lie, one after the other, those of a row in equal order.

        Returns:
            addresses: int64 (columns, operands).
            copies: (column, row) of the tensors that had to be copied for that, and the copies, which must live until they are used.
        """
        found = [column.addresses for column in columns]
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
    """Whether all lie in memory in the same order and without gaps, in row-major order if it must be."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return True
    shape, strides = tensors[0].shape, tensors[0].stride()
    span = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    return not ordered and span == shape.numel() and min(strides) > 0 and all(tensor.stride() == strides for tensor in tensors)
