"""The reference backend: torch operations, one tensor at a time, on any device torch runs on.

It defines the bits that every other backend must give. Each torch operation rounds once, so nothing is contracted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_optim.algorithms import Algorithm, Statistic
from sharded_optim.backends import Operand
from sharded_optim.formats import format_of
from sharded_optim.noise import uniform

__all__ = ["BACKEND"]


class Eager:
    """Torch operations; see `sharded_optim.backends.Backend`."""

    name = "eager"

    def supports(self, device: torch.device, dtypes: frozenset[torch.dtype]) -> str | None:
        return None

    def observe(
        self,
        statistic: Statistic | None,
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
            if statistic is None:
                non_finite[index] = (~torch.isfinite(grad * grad)).sum()
                continue
            values = statistic.observe(grad, *map(_load, operand.state), *row.unbind())
            finite = values <= limit  # False for NaN too
            scaled = torch.where(finite, values, 0.0).to(torch.float64) * math.ldexp(1.0, fraction)
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
        noise_keys: Tensor | None,
    ) -> None:
        for index, (operand, row) in enumerate(zip(operands, coefficients, strict=True)):
            param = operand.format.load(operand.param, *operand.extra)
            param, *state = algorithm.update(param, _load_grad(operand, grad_scale), *map(_load, operand.state), *row.unbind())
            random = None
            if operand.format.is_random:
                assert noise_keys is not None
                random = uniform(noise_keys[index], operand.segment).view(param.shape)
            values = [
                *operand.format.store(param, random),
                *(_store(value, into) for value, into in zip(state, operand.state, strict=True)),
            ]
            for target, value in zip((operand.param, *operand.extra, *operand.state), values, strict=True):
                target.copy_(value if proceed is None else torch.where(proceed, value, target))


def _load(stored: Tensor) -> Tensor:
    return format_of(stored.dtype).load(stored)


def _store(value: Tensor, target: Tensor) -> Tensor:
    (stored,) = format_of(target.dtype).store(value, None)
    return stored


def _load_grad(operand: Operand, grad_scale: Tensor | None) -> Tensor:
    grad = _load(operand.grad)
    return grad if grad_scale is None else grad * grad_scale


BACKEND = Eager()
