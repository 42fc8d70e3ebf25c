"""The reference backend: torch operations, one tensor at a time, on any device torch runs on.

It defines the bits that every other backend must give. Each torch operation rounds once, so nothing is contracted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sharded_optim.algorithms import Algorithm, Statistic
from sharded_optim.backends import Column, Operands
from sharded_optim.consensus import judge
from sharded_optim.formats import Format, format_of
from sharded_optim.noise import uniform

__all__ = ["BACKEND"]


class Eager:
    """Torch operations; see `sharded_optim.backends.Backend`."""

    name = "eager"
    tabulate = None
    judge = staticmethod(judge)

    def supports(self, device: torch.device, dtypes: frozenset[torch.dtype], fmt: Format | None = None) -> str | None:
        return None

    def prepare(self, algorithm: Algorithm, operands: Operands) -> None:
        """There is nothing to do."""

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
        rows = zip(*_columns(operands.grad, *operands.state), coefficients, limits, scales, strict=True)
        for index, (stored_grad, *state, row, limit, scale) in enumerate(rows):
            grad = _load_grad(stored_grad, grad_scale)
            if statistic is None:
                non_finite[index] = (~torch.isfinite(grad * grad)).any()
                continue
            values = statistic.observe(grad, *map(_load, state), *row.unbind())
            finite = values <= limit  # False for NaN too
            scaled = torch.where(finite, values, 0.0) * scale  # exact, by a power of two
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
        fmt = operands.format
        rows = zip(*_columns(operands.param, *operands.extra, *operands.state, operands.grad), coefficients, operands.segments, strict=True)
        for index, (*written, grad, row, segment) in enumerate(rows):
            arrays, state = written[: 1 + len(fmt.extra)], written[1 + len(fmt.extra) :]
            param = fmt.load(*arrays)
            param, *new_state = algorithm.update(param, _load_grad(grad, grad_scale), *map(_load, state), *row.unbind())
            random = None
            if fmt.is_random:
                assert noise_keys is not None
                random = uniform(noise_keys[index], segment).view(param.shape)
            values = [*fmt.store(param, random), *(_store(value, into) for value, into in zip(new_state, state, strict=True))]
            for target, value in zip(written, values, strict=True):
                target.copy_(value if proceed is None else torch.where(proceed, value, target))


def _columns(*columns: Column) -> Iterator[Sequence[Tensor]]:
    return (column.tensors for column in columns)


def _load(stored: Tensor) -> Tensor:
    return format_of(stored.dtype).load(stored)


def _store(value: Tensor, target: Tensor) -> Tensor:
    (stored,) = format_of(target.dtype).store(value, None)
    return stored


def _load_grad(stored: Tensor, grad_scale: Tensor | None) -> Tensor:
    grad = _load(stored)
    return grad if grad_scale is None else grad * grad_scale


BACKEND = Eager()
