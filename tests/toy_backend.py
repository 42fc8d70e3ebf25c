"""A new backend, as its one file would be: all float32 tensors of a call one after the other in one, updated by one set of operations."""

from __future__ import annotations

import torch
from torch import Tensor

from sharded_optim.backends import Column, Operands
from sharded_optim.backends.eager import Eager
from sharded_optim.formulas import Algorithm

__all__ = ["BACKEND"]


class Concatenated(Eager):
    """`Eager`, which also gives coefficients and sums, but for the update."""

    name = "toy_backend"

    def supports(self, device: torch.device, dtypes: frozenset[torch.dtype]) -> str | None:
        if device.type != "cpu":
            return f"it runs on CPUs, not on {device.type}"
        return None if dtypes == {torch.float32} else "it computes with float32 alone"

    def update(
        self,
        algorithm: Algorithm,
        operands: Operands,
        coefficients: Tensor,
        proceed: Tensor | None,
        grad_scale: Tensor | None,
        noise_keys: Tensor | None,
    ) -> None:
        sizes = [grad.numel() for grad in operands.grad.tensors]
        param, *state = (_joined(column) for column in operands.written)
        grad = _joined(operands.grad)
        rows = coefficients.repeat_interleave(torch.tensor(sizes), dim=0).unbind(1)  # each element has its tensor's
        values = algorithm.update(param, grad if grad_scale is None else grad * grad_scale, *state, *rows)
        for column, value in zip(operands.written, values, strict=True):
            for target, part in zip(column.tensors, value.split(sizes), strict=True):
                new = part.view(target.shape)
                target.copy_(new if proceed is None else torch.where(proceed, new, target))


def _joined(column: Column) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in column.tensors])


BACKEND = Concatenated()
