"""Scalar arithmetic of a step, on learning rates, step counters and coefficients: in float64, each operation rounded once.

A number is a Python float, a float64 tensor with a value for each operand, or a `Recorded`: then nothing is computed yet, but every
operation is written down, for a backend that computes all of them in one call. All three give the same bits. Besides these functions,
`+ - *` are allowed. `/` is not: torch multiplies by a reciprocal for it, which rounds twice.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharded_optim.formulas.recording import Number, Recorded, Recorder, Step
from sharded_optim.formulas.verdict import NON_FINITE, TOTAL

__all__ = [
    "FUNCTIONS",
    "STEP_BITS",
    "Number",
    "Step",
    "Sums",
    "at_first_step",
    "bias_correction",
    "divide",
    "maximum",
    "mean",
    "nan_where",
    "power",
    "sqrt",
]

STEP_BITS = 25  # steps are counted in float32, as torch does: exact up to 2**24


def divide(a: Number, b: Number) -> Number:
    if isinstance(a, Recorded) or isinstance(b, Recorded):
        return Recorder.of(a, b).record("divide", a, b)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.divide(_like(a, b), _like(b, a))
    return a / b


def sqrt(a: Number) -> Number:
    if isinstance(a, Recorded):
        return Recorder.of(a).record("sqrt", a)
    if not isinstance(a, Tensor):
        return math.sqrt(a)
    if a.device.type != "cpu":
        return torch.sqrt(a)
    # On a CPU MKL's is off for one value in seventy.
    return torch.tensor([math.sqrt(value) for value in a.flatten().tolist()], dtype=torch.float64, device="cpu").view(a.shape)


def maximum(a: Number, least: float) -> Number:
    """Elementwise maximum; NaN stays NaN."""
    if isinstance(a, Recorded):
        return Recorder.of(a).record("maximum", a, least)
    return a.clamp(min=least) if isinstance(a, Tensor) else a if a != a else max(a, least)


def power(base: float, exponent: Step) -> Number:
    """Integer power by repeated squaring: IEEE multiplication gives the same bits everywhere, a library's `pow` does not."""
    if isinstance(exponent, Recorded):
        return Recorder.of(exponent).record("power", base, exponent)
    if isinstance(exponent, Tensor):
        result = torch.ones(exponent.shape, dtype=torch.float64, device=exponent.device)
        for bit in range(STEP_BITS):
            result = torch.where((exponent >> bit) & 1 == 1, result * base, result)
            base = base * base
        return result
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base = base * base
        exponent >>= 1
    return result


def bias_correction(beta: float, step: Step) -> Number:
    """1 - beta**step, in float64, by which a moving average is divided (Adam, Kingma & Ba 2015, section 3).

    Args:
        beta: decay of the moving average, in [0, 1).
        step: 1 in the first step; an int, an int64 tensor of steps, or recorded. All give the same bits.
    """
    return 1.0 - power(beta, step)


def at_first_step(step: Step, value: float, otherwise: float) -> Number:
    if isinstance(step, Recorded):
        return Recorder.of(step).record("at_first_step", step, value, otherwise)
    if isinstance(step, Tensor):
        return torch.where(step == 1, _like(value, step), _like(otherwise, step))
    return value if step == 1 else otherwise


def nan_where(flag: Number, value: Number) -> Number:
    """NaN where the flag, an int64 if it is not recorded, is positive."""
    if isinstance(flag, Recorded):
        return Recorder.of(flag).record("nan_where", flag, value)
    assert isinstance(flag, Tensor)
    return torch.where(flag > 0, math.nan, _like(value, flag))


def _like(number: Number, other: Number) -> Tensor:
    if isinstance(number, Tensor):
        return number
    assert isinstance(other, Tensor)
    assert not isinstance(number, Recorded)
    return torch.full_like(other, number, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums of the statistic over all ranks, for the tensors that the operands are pieces of; all on one device.

    The mean of each operand's tensor is a number of these inputs: `total`, `unit`, `numel` and `non_finite`.
    """

    vector: Tensor  # int64: sums over ranks, the rows of `verdict.py` first, one after the other
    tensors: int  # columns of a row
    slots: Tensor  # int64 (operands,), which tensor is each operand's
    units: Tensor  # float64 (operands,), of the fixed point
    numels: Tensor  # float64 (operands,), of the tensor, but at least 1

    @property
    def totals(self) -> Tensor:
        """Sums in fixed point: int64 (tensors,), a view."""
        return self.vector[TOTAL * self.tensors :][: self.tensors]

    @property
    def non_finite(self) -> Tensor:
        """Positive where the sum is none, as something was not finite: int64 (tensors,), a view."""
        return self.vector[NON_FINITE * self.tensors :][: self.tensors]

    @staticmethod
    def recorded_mean(recorder: Recorder) -> Number:
        """Mean of the statistic over each operand's tensor; NaN where it was not finite."""
        return mean(*map(recorder.input, ("total", "unit", "numel", "non_finite")))

    def inputs(self) -> dict[str, Tensor]:
        """The values of these inputs: (operands,)."""
        of_operands = {"total": self.totals[self.slots].to(torch.float64), "non_finite": self.non_finite[self.slots]}
        return of_operands | {"unit": self.units, "numel": self.numels}


def mean(total: Number, unit: Number, numel: Number, non_finite: Number) -> Number:
    """Mean of a statistic that was summed in fixed point over a tensor: float64; NaN where it was not finite.

    Args:
        total: sum of integers.
        unit: 2**-k.
        numel: of the tensor.
        non_finite: positive where the statistic was not finite; int64.
    """
    return nan_where(non_finite, divide(total * unit, numel))


# Of each operation that is recorded.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "double": lambda number: number.to(torch.float64) if isinstance(number, Tensor) else float(number),
    "divide": divide,
    "sqrt": sqrt,
    "maximum": maximum,
    "power": power,
    "at_first_step": at_first_step,
    "nan_where": nan_where,
}
