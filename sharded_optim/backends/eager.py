"""The reference backend: torch operations, one tensor at a time, on any device torch runs on.

It defines the bits that every other backend must give. Each torch operation rounds once, so nothing is contracted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_optim.algorithms import Algorithm
from sharded_optim.backends import Operand
from sharded_optim.formats import format_of

__all__ = ["BACKEND"]


class Eager:
    """Torch operations; see `sharded_optim.backends.Backend`."""

    name = "eager"

    def supports(self, device: torch.device, dtypes: frozenset[torch.dtype]) -> str | None:
        return None

    def observe(
        self,
        algorithm: Algorithm,
        operands: Sequence[Operand],
        coefficients: Tensor,
        limits: Sequence[float],
        bits: Sequence[int],
        grad_scale: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        sums = torch.zeros(len(operands), dtype=torch.int64, device=coefficients.device)
        non_finite = torch.zeros_like(sums)
        for index, (operand, row, limit, fraction) in enumerate(zip(operands, coefficients, limits, bits, strict=True)):
            grad = _load_grad(operand, grad_scale)
            if algorithm.statistic is None:
                non_finite[index] = (~torch.isfinite(grad * grad)).sum()
                continue
            statistic = algorithm.statistic.observe(grad, *map(_load, operand.state), *row.unbind())
            finite = statistic <= limit  # False for NaN too
            scaled = torch.where(finite, statistic, 0.0).to(torch.float64) * math.ldexp(1.0, fraction)
            sums[index] = scaled.round().to(torch.int64).sum()
            non_finite[index] = (~finite).sum()
        return sums, non_finite

    def update(
        self,
        algorithm: Algorithm,
        operands: Sequence[Operand],
        coefficients: Tensor,
        proceed: Tensor | None,
        grad_scale: Tensor | None,
    ) -> None:
        for operand, row in zip(operands, coefficients, strict=True):
            grad = _load_grad(operand, grad_scale)
            stored = (operand.param, *operand.state)
            param, *state = map(_load, stored)
            values = algorithm.update(param, grad, *state, *row.unbind())
            for target, value in zip(stored, values, strict=True):
                new = format_of(target.dtype).store(value)
                target.copy_(new if proceed is None else torch.where(proceed, new, target))


def _load(stored: Tensor) -> Tensor:
    return format_of(stored.dtype).load(stored)


def _load_grad(operand: Operand, grad_scale: Tensor | None) -> Tensor:
    grad = _load(operand.grad)
    return grad if grad_scale is None else grad * grad_scale


BACKEND = Eager()
