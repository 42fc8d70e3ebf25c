"""Scalar arithmetic on learning rates, step counters and coefficients: in float64, each operation rounded once.

A number is a Python float, a float64 tensor with one value per operand, or a `Recorded`, whose operations are only recorded, for a backend
that computes all of them in one call. All three give the same bits. Besides these functions `+ - *` are allowed, but not `/`: torch
computes number / tensor with a reciprocal, which rounds twice.
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

STEP_BITS = 25  # bits of a step number: like torch's, step counters are float32, which is exact up to 2**24


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
    # On a CPU torch uses MKL, which rounds one value in seventy wrongly.
    return torch.tensor([math.sqrt(value) for value in a.flatten().tolist()], dtype=torch.float64, device="cpu").view(a.shape)


def maximum(a: Number, least: float) -> Number:
    """Return the elementwise maximum of `a` and `least`; NaN stays NaN."""
    if isinstance(a, Recorded):
        return Recorder.of(a).record("maximum", a, least)
    return a.clamp(min=least) if isinstance(a, Tensor) else a if a != a else max(a, least)


def power(base: float, exponent: Step) -> Number:
    """Return an integer power by repeated squaring: IEEE multiplication gives the same bits everywhere, a library's `pow` does not."""
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
    """Return 1 - beta**step, in float64: the divisor that debiases a moving average (Adam, Kingma & Ba 2015, section 3).

    Args:
        beta: decay of the moving average, in [0, 1).
        step: number of the step, from 1: an int, an int64 tensor, or recorded. All give the same bits.
    """
    return 1.0 - power(beta, step)


def at_first_step(step: Step, value: float, otherwise: float) -> Number:
    """Return `value` in the first step, `otherwise` in all later ones."""
    if isinstance(step, Recorded):
        return Recorder.of(step).record("at_first_step", step, value, otherwise)
    if isinstance(step, Tensor):
        return torch.where(step == 1, _like(value, step), _like(otherwise, step))
    return value if step == 1 else otherwise


def nan_where(flag: Number, value: Number) -> Number:
    """Return NaN where `flag`, an int64 tensor or a recorded number, is positive, and `value` elsewhere."""
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
    """Sums of the statistic over all ranks, for the tensors that contain the operands; all on one device.

    The mean over an operand's tensor is computed from four inputs: `total`, `unit`, `numel` and `non_finite`.
    """

    vector: Tensor  # int64 (SECTIONS * tensors + TAIL,): the vector of `verdict.py`, summed over ranks
    tensors: int  # columns of a row
    slots: Tensor  # int64 (operands,): column of each operand's tensor
    units: Tensor  # float64 (operands,): 2**-k of the fixed-point sum
    numels: Tensor  # float64 (operands,): number of elements of the whole tensor, at least 1

    @property
    def totals(self) -> Tensor:
        """Sums of each tensor's statistic in fixed point: int64 (tensors,), a view."""
        return self.vector[TOTAL * self.tensors :][: self.tensors]

    @property
    def non_finite(self) -> Tensor:
        """Positive where something was not finite, so that the sum is meaningless: int64 (tensors,), a view."""
        return self.vector[NON_FINITE * self.tensors :][: self.tensors]

    @staticmethod
    def recorded_mean(recorder: Recorder) -> Number:
        """Record the mean of the statistic over each operand's tensor; NaN where it was not finite."""
        return mean(*map(recorder.input, ("total", "unit", "numel", "non_finite")))

    def inputs(self) -> dict[str, Tensor]:
        """Return the values of the four inputs, keyed by name: (operands,) each."""
        of_operands = {"total": self.totals[self.slots].to(torch.float64), "non_finite": self.non_finite[self.slots]}
        return of_operands | {"unit": self.units, "numel": self.numels}


def mean(total: Number, unit: Number, numel: Number, non_finite: Number) -> Number:
    """Return the mean over a tensor of a statistic that was summed in fixed point: float64; NaN where it was not finite.

    Args:
        total: the fixed-point sum, an integer.
        unit: 2**-k, the value of 1 in the fixed-point sum.
        numel: number of elements of the tensor.
        non_finite: int64; positive where the statistic was not finite.
    """
    return nan_where(non_finite, divide(total * unit, numel))


# The function of each operation in a record, keyed by its name.
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
