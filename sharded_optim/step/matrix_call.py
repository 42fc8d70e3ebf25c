"""Kernel calls of algorithms that compute with whole matrices: write directions, then, after the matrix exchange, update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sharded_optim.backends.operands import Column, Operands, addresses_of
from sharded_optim.formulas import Matrix
from sharded_optim.sharding import PARAMETER, Layout
from sharded_optim.step.agreement import Agreement, Scaler
from sharded_optim.step.coefficients import GroupValues, coefficient_table
from sharded_optim.step.grouped import matrices_of
from sharded_optim.step.kernel_call import KernelCall
from sharded_optim.step.matrix_exchange import Compute, MatrixExchange
from sharded_optim.step.metrics import Measured, Update
from sharded_optim.step.stateful import StatefulOptimizer
from sharded_optim.storage.formats import format_of

__all__ = ["MatrixCall"]


class MatrixCall(KernelCall):
    """The local parameters whose matrices one algorithm steps, in two passes of a backend: `write_directions`, then `update`.

    `operands` has all tensors of a step, as in any kernel call. The operands of each pass share its columns, with pieces of the exchange
    buffer in place of the parameters (first pass) or the gradients (second pass).

    Attributes:
        measures: whether steps measure their updates for reports, because they cannot be recomputed later.
    """

    measures = False

    def __init__(self, optimizer: StatefulOptimizer, layout: Layout, *args: Any, exchanges: Mapping[torch.dtype, MatrixExchange]) -> None:
        self._exchanges = exchanges
        self._layout_device = layout.device
        super().__init__(optimizer, layout, *args)

    @property
    def matrix(self) -> Matrix:
        assert self.algorithm.matrix is not None, "MatrixCall is only for algorithms with a matrix function"
        return self.algorithm.matrix

    def _prepare(self) -> None:
        self._check_matrices()
        self._exchange = self._exchanges[self.matrix.dtype]
        operands, self._buffer = self.operands, Column(self._pieces_of_buffer())
        self.buffers = (self._buffer,)
        self._directing = Operands(
            segments=operands.segments,
            format=format_of(self._exchange.dtype),
            param=self._buffer,
            extra=(),
            grad=operands.grad,
            state_formats=operands.state_formats,
            state=operands.state,
        )
        self._applying = Operands(
            segments=operands.segments,
            format=operands.format,
            param=operands.param,
            extra=operands.extra,
            grad=self._buffer,
            state_formats=(),
            state=(),
        )
        self.backend.prepare(self.algorithm, self._directing, [self.members.formulas(self.algorithm.coefficients, 1.0)])
        self.backend.prepare(self.matrix.apply, self._applying, [self.members.formulas(self.matrix.apply.coefficients, 1.0)])

    def write_directions(self, proceed: Tensor | None, scaler: Scaler) -> dict[int, Compute]:
        """Write directions to the exchange buffer, and write the state; nothing if the step does not happen.

        Returns:
            The function that a matrix's owner applies to it, keyed by the index of each piece of the matrix.
        """
        views = self._pieces_of_buffer()
        self._buffer.renew(views, addresses_of(views))
        algorithm, members = self.algorithm, self.members
        table = coefficient_table(algorithm.coefficients, members, self.steps, 1.0, backend=self.backend, operands=self._directing)
        happens = None if proceed is None else proceed.to(self.device)
        keys = self._rounding_keys(*self.algorithm.state)
        self._grad_scale = scaler.inverse(self.device)
        self.backend.update(algorithm, self._directing, table, happens, self._grad_scale, keys)
        computes = [partial(_computed, self.matrix, group) for group in members.groups]
        return {index: computes[group] for index, group in zip(self.places.indices.tolist(), self.group_of, strict=True)}

    def update(self, agreement: Agreement | None, proceed: Tensor | None, scaler: Scaler, *, accumulate: bool) -> Update:
        """Update the parameters by the results, which the exchange has written to its buffer, and count the step."""
        assert not accumulate, "only steps inside backward accumulate, and the engine refuses them"
        apply = self.matrix.apply
        table = coefficient_table(apply.coefficients, self.members, self.steps, 1.0, backend=self.backend, operands=self._applying)
        happens = None if proceed is None else proceed.to(self.device)
        keys = self._rounding_keys(PARAMETER)
        measured = self._measured(table) if self.measures else None
        self.backend.update(apply, self._applying, table, happens, None, keys)
        return replace(self._finish(table, happens, self._grad_scale), measured=measured)

    def _measured(self, table: Tensor) -> list[Measured]:
        """Compute in float64 what the update will subtract from each piece. Needs several times the memory of one piece."""
        operands, measured = self._applying, []
        columns = [column.tensors for column in (operands.param, *operands.extra)]
        for *stored, result, grad, row in zip(*columns, operands.grad.tensors, self.operands.grad.tensors, table, strict=True):
            value = operands.format.load(*stored).double()
            (updated,) = self.matrix.apply.update(value, result.double(), *row.double().unbind())
            measured.append(Measured.of(value - updated, grad))
        return measured

    def release(self) -> None:
        super().release()
        self._buffer.release()

    def take_values(self, values: Mapping[int, GroupValues], optimizer: StatefulOptimizer) -> bool:
        before = self.values
        if not super().take_values(values, optimizer):
            return False
        if self.values is not before:
            self._check_matrices()
        return True

    def _check_matrices(self) -> None:
        """Raise ValueError if the matrices differ from those that the ranks have planned to exchange."""
        for (entry, piece), group in zip(self.pieces, self.group_of, strict=True):
            if self.device != self._layout_device:
                raise ValueError(
                    f"{entry.name!r} is on {self.device}, other parameters on {self._layout_device}: the matrices that ranks exchange must "
                    f"be on one device of each rank; move the model to one device"
                )
            try:
                matrices = matrices_of(self.matrix, piece.segment.shape, self.members.groups[group])
            except ValueError as error:
                raise ValueError(f"parameter {entry.name!r} {error}") from None
            if piece.matrices != matrices:
                raise ValueError(
                    f"{entry.name!r} is no longer stepped as the same matrices as in its first step (algorithm, split, stacked or ns_dtype "
                    f"of its param group has changed), but the ranks' division of work is fixed; build a new optimizer, load the state "
                    f"dict, and change its param groups before its first step"
                )

    def _pieces_of_buffer(self) -> list[Tensor]:
        """Return the part of the exchange buffer for each operand: a view in the shape of the operand's parameter."""
        indices = self.places.indices.tolist()
        shapes = [piece.of(entry.local(entry.param, PARAMETER)).shape for entry, piece in self.pieces]
        return [self._exchange.piece(index).view(shape) for index, shape in zip(indices, shapes, strict=True)]


def _computed(matrix: Matrix, group: Any, direction: Tensor) -> Tensor:
    return matrix.function(direction, group)
