"""The CPU backend: the algorithms' own source, compiled by LLVM into one pass over all tensors, limited only by memory bandwidth.

`kernels.py` writes a kernel for each combination of algorithm and formats in use: the loops of `loops.py` around the functions that the
eager backend runs, which write LLVM instructions when they are called with the vectors of `vectors.py`. `formulas.py` writes the kernels of
coefficients, and `per_tensor.py` those of the agreement and of step counters. `llvm.py` compiles a kernel, and `threads.py` runs it.

A kernel gets a table of addresses, one column per operand, and a table of work items of at most `CHUNK` elements, divided between threads.
Memory needs no alignment. The tensors of one operand must be dense with the same strides, as wrappers give them; others are copied.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sharded_optim.backends import Column, Operands
from sharded_optim.backends.cpu.formulas import FormulaArguments, formula_kernel
from sharded_optim.backends.cpu.kernels import observe_kernel, update_kernel
from sharded_optim.backends.cpu.loops import Arguments, reason_against
from sharded_optim.backends.cpu.per_tensor import AdditionArguments, CounterArguments, ItemArguments, VerdictArguments
from sharded_optim.backends.cpu.per_tensor import kernels as per_tensor_kernels
from sharded_optim.backends.cpu.threads import Call, Kernel, run
from sharded_optim.backends.operands import OperandTables
from sharded_optim.formulas import Algorithm, Statistic
from sharded_optim.formulas.recording import Formulas
from sharded_optim.formulas.scalars import Sums
from sharded_optim.formulas.verdict import NON_FINITE, SECTIONS, TAIL, Verdict, advance

__all__ = ["BACKEND"]

CHUNK = 16384  # elements of a work item: a few microseconds
WORTH_A_THREAD = 2 * CHUNK  # elements for which waking a thread pays off: about 10 us of work
ONE = torch.ones((), dtype=torch.float32, device="cpu")


class Cpu:
    """Runs kernels compiled by LLVM; see `sharded_optim.backends.Backend`."""

    name = "cpu"

    def supports(self, device: torch.device, dtypes: frozenset[torch.dtype]) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device}"
        return next(filter(None, map(reason_against, sorted(dtypes, key=str))), None)

    def prepare(self, algorithm: Algorithm, operands: Operands, formulas: Sequence[Formulas] = ()) -> None:
        self._tables_of(operands)
        per_tensor_kernels()
        update_kernel(algorithm, operands.formats, operands.grad_format)
        for each in formulas:
            self._kernels_of(each)

    def tabulate(
        self,
        operands: Operands,
        formulas: Formulas,
        formula_of: Tensor | None,
        steps: Tensor,
        sums: Sums | None,
        lr: Tensor,
    ) -> Tensor:
        operands_count = steps.numel()
        table = torch.empty(operands_count, formulas.results, dtype=torch.float32, device="cpu")
        addresses = list(map(Tensor.data_ptr, (table, steps, lr)))
        if sums is not None:
            totals = sums.vector.data_ptr()
            non_finite = totals + NON_FINITE * sums.tensors * sums.vector.element_size()
            addresses += (totals, non_finite, *map(Tensor.data_ptr, (sums.slots, sums.units, sums.numels)))
        formula_of_address = 0 if formula_of is None else formula_of.data_ptr()
        for call, constants in self._kernels_of(formulas):
            _call(call, FormulaArguments(operands_count, constants.buffer_info()[0], formula_of_address, *addresses))
        return table

    def contribute(self, vector: Tensor, observed: Tensor, counted: Tensor, slots: Tensor) -> None:
        numbers = (slots.numel(), (vector.numel() - TAIL) // SECTIONS)
        _call(per_tensor_kernels().add, AdditionArguments(*numbers, *map(Tensor.data_ptr, (observed, counted, slots, vector))))

    def judge(self, sums: Tensor, *, skips: bool) -> Verdict:
        flags, proceed = torch.empty(3, dtype=torch.int64, device="cpu"), torch.empty((), dtype=torch.bool, device="cpu")
        tensors = (sums.numel() - TAIL) // SECTIONS
        _call(per_tensor_kernels().judge, VerdictArguments(sums.data_ptr(), tensors, skips, flags.data_ptr(), proceed.data_ptr()))
        return Verdict(flags=flags, proceed=proceed)

    def observe(
        self,
        statistic: Statistic | None,
        operands: Operands,
        coefficients: Tensor,
        limits: Tensor,
        scales: Tensor,
        grad_scale: Tensor | None,
    ) -> Tensor:
        formats = operands.state_formats if statistic else ()
        columns = [*(operands.state if statistic else ()), operands.grad]
        tables = self._tables_of(operands)
        kernel = observe_kernel(statistic, operands.grad_format, formats)
        _run(
            kernel, tables, columns, coefficients, ONE if grad_scale is None else grad_scale, limits=limits, scales=scales, sums=tables.sums
        )
        result = torch.empty(2, len(operands), dtype=torch.int64, device="cpu")
        addresses = map(Tensor.data_ptr, (tables.work, tables.sums, result))
        _call(per_tensor_kernels().sum_items, ItemArguments(tables.items, tables.operands, *addresses))
        return result

    def update(
        self,
        algorithm: Algorithm,
        operands: Operands,
        coefficients: Tensor,
        proceed: Tensor | None,
        grad_scale: Tensor | None,
        noise_keys: Tensor | None,
    ) -> None:
        if proceed is not None and not proceed.numpy():
            return
        written = operands.written
        tables = self._tables_of(operands)
        kernel = update_kernel(algorithm, operands.formats, operands.grad_format)
        scale = ONE if grad_scale is None else grad_scale
        keys = {} if noise_keys is None else {"keys": noise_keys.contiguous()}
        copies = _run(kernel, tables, [*written, operands.grad], coefficients, scale, runs=tables.runs, **keys)
        for (column, row), copy in copies.items():
            if column < len(written):
                written[column].tensors[row].copy_(copy)
        increment_version(operands.param.wholes)  # as torch operations do: autograd checks versions

    def advance(self, steps: Tensor, happens: Tensor | None) -> None:
        if happens is None:
            _call(per_tensor_kernels().advance, CounterArguments(steps.data_ptr(), steps.numel()))
        else:
            advance(steps, happens)

    def _tables_of(self, operands: Operands) -> _Tables:
        tables: _Tables | None = operands.derived.get(self)
        if tables is None:
            tables = operands.derived[self] = _Tables(operands, CHUNK)
        return tables

    def _kernels_of(self, formulas: Formulas) -> list[tuple[Call, array[float]]]:
        """Return (kernel, constants) for each distinct sequence of operations."""
        kernels: list[tuple[Call, array[float]]] | None = formulas.derived.get(self)
        if kernels is None:
            several = len(formulas.formulas) > 1
            kernels = [(formula_kernel(each, several=several).call, constants) for each, constants in formulas.constants.items()]
            formulas.derived[self] = kernels
        return kernels


class _Tables(OperandTables):
    """Tables of operands, and memory for a kernel's sums, which is reused in every step."""

    def __init__(self, operands: Operands, chunk: int) -> None:
        super().__init__(operands, chunk)
        self.operands, self.items = len(self.runs), len(self.work)
        self.work_address = self.work.data_ptr()
        self.sums = torch.empty(len(self.work), 2, dtype=torch.int64, device="cpu")  # sum and flag of each work item


def _run(
    kernel: Kernel,
    tables: _Tables,
    columns: list[Column],
    coefficients: Tensor,
    grad_scale: Tensor,
    **others: Tensor,  # optional arrays of `Arguments`, keyed by name; contiguous
) -> dict[tuple[int, int], Tensor]:
    """Run a kernel on all operands; return the copies that it has read and written, see `OperandTables.addresses`."""
    packed, copies = tables.addresses(columns)
    addresses = array("q", packed)
    coefficients = coefficients.contiguous()
    arguments = Arguments(
        work=tables.work_address,
        items=tables.items,
        addresses=addresses.buffer_info()[0],
        operands=tables.operands,
        coefficients=coefficients.data_ptr(),
        grad_scale=grad_scale.data_ptr(),
        **{name: tensor.data_ptr() for name, tensor in others.items()},
    )
    table = array("q", arguments)
    run(kernel, table.buffer_info()[0], _shares(tables.elements))
    return copies


def _call(function: Call, arguments: tuple[int, ...]) -> None:
    packed = array("q", arguments)
    function(packed.buffer_info()[0], 0, 1)


def _shares(elements: int) -> int:
    """Return the number of threads worth waking, at most torch's number, which torchrun and OMP_NUM_THREADS set."""
    return max(1, min(torch.get_num_threads(), elements // WORTH_A_THREAD))


BACKEND = Cpu()
