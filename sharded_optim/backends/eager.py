"""The reference backend: torch operations, one tensor at a time, on any device torch runs on.

It defines the bits that every other backend must reproduce. Each torch operation rounds once, so nothing is contracted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from sharded_optim.backends import Column, Operands
from sharded_optim.backends.noise import uniform
from sharded_optim.formulas import Algorithm, Statistic
from sharded_optim.formulas.recording import Formula, Formulas
from sharded_optim.formulas.scalars import FUNCTIONS, Sums
from sharded_optim.formulas.verdict import advance, contribute, judge
from sharded_optim.storage.devices import known_on_host
from sharded_optim.storage.format import Format

__all__ = ["BACKEND"]


class Eager:
    """Runs torch operations; see `sharded_optim.backends.Backend`."""

    name = "eager"
    advance = staticmethod(advance)
    contribute = staticmethod(contribute)
    judge = staticmethod(judge)

    def supports(self, device: torch.device, dtypes: frozenset[torch.dtype]) -> str | None:
        return None

    def prepare(self, algorithm: Algorithm, operands: Operands, formulas: Sequence[Formulas] = ()) -> None:
        """Do nothing: torch operations need no preparation."""

    def tabulate(
        self,
        operands: Operands,
        formulas: Formulas,
        formula_of: Tensor | None,
        steps: Tensor,
        sums: Sums | None,
        lr: Tensor,
    ) -> Tensor:
        inputs = {} if sums is None else sums.inputs()
        if formula_of is None:
            return _table(formulas.formulas[0], inputs, lr[0], steps)
        table = torch.empty(len(steps), formulas.results, dtype=torch.float32, device=steps.device)
        for index, formula in enumerate(formulas.formulas):
            own = formula_of == index
            if known_on_host(formula_of):
                own_inputs = {name: value[own] for name, value in inputs.items()}
                table[own] = _table(formula, own_inputs, lr[index], steps[own])
            else:  # indexing by a mask would wait for the device to count its rows
                table = torch.where(own.unsqueeze(1), _table(formula, inputs, lr[index], steps), table)
        return table

    def observe(
        self,
        statistic: Statistic | None,
        operands: Operands,
        coefficients: Tensor,
        limits: Tensor,
        scales: Tensor,
        grad_scale: Tensor | None,
    ) -> Tensor:
        result = torch.zeros(2, len(operands), dtype=torch.int64, device=coefficients.device)
        sums, non_finite = result
        grad_format = operands.grad_format
        rows = zip(*_columns(operands.grad, *operands.state), coefficients, limits, scales, strict=True)
        for index, (stored_grad, *stored_state, row, limit, scale) in enumerate(rows):
            grad = _scaled(grad_format.load(stored_grad), grad_scale)
            if statistic is None:
                non_finite[index] = (~torch.isfinite(grad * grad)).any()
                continue
            values = statistic.observe(grad, *_loaded(operands.state_formats, stored_state), *row.unbind())
            finite = values <= limit  # False for NaN too
            scaled = torch.where(finite, values, 0.0) * scale  # exact: scale is a power of two
            sums[index] = scaled.round().to(torch.int64).sum()
            non_finite[index] = (~finite).any()
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
        formats, grad_format = operands.formats, operands.grad_format
        rows = zip(*_columns(*operands.written, operands.grad), coefficients, operands.segments, strict=True)
        for index, (*stored, stored_grad, row, segment) in enumerate(rows):
            param, *state = _loaded(formats, stored)
            values = algorithm.update(param, _scaled(grad_format.load(stored_grad), grad_scale), *state, *row.unbind())
            draws = iter(()) if noise_keys is None else (uniform(key, segment).view(param.shape) for key in noise_keys[index])
            new = [
                each for fmt, value in zip(formats, values, strict=True) for each in fmt.store(value, next(draws) if fmt.is_random else 0.0)
            ]
            for target, value in zip(stored, new, strict=True):
                target.copy_(value if proceed is None else torch.where(proceed, value, target))


def _next_step(steps: Tensor) -> int | Tensor:
    """Return the number of the coming step, from 1: an int if it is on the host and the same for all operands, else int64 (operands,)."""
    known = set(steps.tolist()) if known_on_host(steps) else ()
    return int(known.pop()) + 1 if len(known) == 1 else steps.to(torch.int64) + 1


def _table(formula: Formula, inputs: Mapping[str, Tensor], lr: Tensor, steps: Tensor) -> Tensor:
    """Evaluate a formula for each operand: fp32 (operands, results)."""
    values: dict[str, Any] = {f"c{index}": constant for index, constant in enumerate(formula.constants)}
    values |= {**inputs, "step": _next_step(steps), "lr": lr.tolist() if known_on_host(lr) else lr}
    values = formula.operations.evaluate(FUNCTIONS, values)
    results = [values[name] for name in formula.operations.results]
    if known_on_host(steps) and not any(isinstance(value, Tensor) for value in results):
        return torch.tensor([results], dtype=torch.float32, device="cpu").expand(len(steps), -1).contiguous()
    # Constants are filled in on the device: a copy from the host would wait, and a CUDA graph could not capture it.
    columns = [
        value.expand(len(steps)) if isinstance(value, Tensor) else torch.full(steps.shape, value, dtype=torch.float64, device=steps.device)
        for value in results
    ]
    return torch.stack(columns, dim=1).to(torch.float32)


def _columns(*columns: Column) -> Iterator[Sequence[Tensor]]:
    return (column.tensors for column in columns)


def _loaded(formats: Sequence[Format], stored: Sequence[Tensor]) -> list[Tensor]:
    """Load one value tensor per format from its arrays."""
    arrays = iter(stored)
    return [fmt.load(*islice(arrays, len(fmt.arrays))) for fmt in formats]


def _scaled(grad: Tensor, grad_scale: Tensor | None) -> Tensor:
    return grad if grad_scale is None else grad * grad_scale


BACKEND = Eager()
