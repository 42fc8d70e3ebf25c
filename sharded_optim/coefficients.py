"""From hyperparameters, step counters and learning-rate scales to the table of coefficients that a backend reads. Used by the engine.

Nothing here waits for a device: what the host knows is computed in Python floats, what only the device knows in float64 tensors there. Both
give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_optim.algorithms import Coefficients

__all__ = ["coefficient_table", "host_value", "known_on_host", "next_steps"]


def known_on_host(tensor: Tensor) -> bool:
    """Whether reading a value waits for nothing."""
    return tensor.device.type == "cpu"


def host_value(tensor: Tensor) -> Any:
    """The one value of a tensor that is known on the host, as a Python number."""
    return tensor.detach().reshape(()).tolist()


def coefficient_table(
    coefficients: Callable[..., Coefficients],  # (hyperparameters, step) or (hyperparameters, step, lr_scale)
    members: Sequence[tuple[Mapping[str, Any], Tensor | None]],  # param groups, and the rows of their operands: int64, or None for all
    steps: Tensor,  # fp32 (operands,), taken so far by each
    lr_scale: float | Tensor | None = None,  # passed on where given; float64 (operands,) if a tensor
) -> Tensor:
    """One row of coefficients for each operand: fp32 (operands, coefficients), computed in float64 and rounded once."""
    table = None
    for group, rows in members:
        own_steps = steps if rows is None else steps[rows]
        arguments: list[Any] = [{**group, "lr": _current_lr(group, steps.device)}, _next_step(own_steps)]
        if lr_scale is not None:
            arguments.append(lr_scale[rows] if isinstance(lr_scale, Tensor) and rows is not None else lr_scale)
        part = _columns(coefficients(*arguments), len(own_steps), steps.device)
        if rows is None:
            return part
        if table is None:
            table = torch.empty(len(steps), part.shape[1], device=steps.device)
        table[rows] = part
    assert table is not None, "a batch has a group"
    return table


def _columns(values: Coefficients, rows: int, device: torch.device) -> Tensor:
    if device.type == "cpu" and not any(isinstance(value, Tensor) for value in values):
        return torch.tensor([values], dtype=torch.float32).expand(rows, -1).contiguous()
    # Not copied to a device but filled in there: a copy would have to wait, and a CUDA graph could not record it.
    columns = [
        value.expand(rows) if isinstance(value, Tensor) else torch.full((rows,), value, dtype=torch.float64, device=device)
        for value in values
    ]
    return torch.stack(columns, dim=1).to(torch.float32)


def _current_lr(group: Mapping[str, Any], device: torch.device) -> float | Tensor:
    """This step's learning rate: a float, or a float64 tensor on `device`."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        return host_value(lr) if known_on_host(lr) else lr.detach().to(device).double().reshape(())
    return float(lr)


def _next_step(steps: Tensor) -> int | Tensor:
    """The step about to be taken, from 1: an int where the host knows it and all agree, else int64 (operands,)."""
    if known_on_host(steps):
        known = set(steps.tolist())
        if len(known) == 1:
            return int(known.pop()) + 1
    return next_steps(steps)


def next_steps(steps: Tensor) -> Tensor:
    """The step about to be taken by each, from 1: int64 (operands,)."""
    return steps.to(torch.int64) + 1
