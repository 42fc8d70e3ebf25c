"""From hyperparameters, step counters and learning-rate scales to the table of coefficients that a backend reads. Used by the engine.

Nothing here waits for a device: what the host knows is computed in Python floats, what only the device knows in float64 tensors there. Both
give the same bits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_optim.algorithms import Coefficients

__all__ = ["coefficient_table", "known_on_host", "next_steps"]


def known_on_host(tensor: Tensor) -> bool:
    """Whether reading a value waits for nothing."""
    return tensor.device.type == "cpu"


def coefficient_table(
    coefficients: Callable[..., Coefficients],  # (hyperparameters, step) or (hyperparameters, step, lr_scale)
    groups: Sequence[dict[str, Any]],  # the param group of each operand
    steps: Sequence[Tensor],  # steps taken so far by each, 0-dim
    device: torch.device,
    lr_scale: float | Tensor | None = None,  # passed on where given; float64 (operands,) if a tensor
) -> Tensor:
    """One row of coefficients for each operand: fp32 (operands, coefficients), computed in float64 and rounded once."""
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        rows_of[id(group)].append(row)
    parts = []
    for rows in rows_of.values():
        group = groups[rows[0]]
        arguments: list[Any] = [group | {"lr": _current_lr(group, device)}, _next_step([steps[row] for row in rows], device)]
        if isinstance(lr_scale, Tensor) and len(rows) < len(groups):
            arguments.append(lr_scale[_indices(rows, device)])
        elif lr_scale is not None:
            arguments.append(lr_scale)
        columns = [
            value.expand(len(rows)) if isinstance(value, Tensor) else torch.full((len(rows),), value, dtype=torch.float64, device=device)
            for value in coefficients(*arguments)
        ]
        parts.append(torch.stack(columns, dim=1))
    if len(parts) == 1:
        return parts[0].to(torch.float32)
    order = [row for rows in rows_of.values() for row in rows]
    place = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(parts)[_indices(place, device)].to(torch.float32)


def _current_lr(group: dict[str, Any], device: torch.device) -> float | Tensor:
    """This step's learning rate: a float, or a float64 tensor on `device`."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and not known_on_host(lr):
        return lr.detach().to(device).double().reshape(())
    return float(lr)


def _next_step(steps: Sequence[Tensor], device: torch.device) -> int | Tensor:
    """The step about to be taken, from 1: an int where the host knows it and all agree, else int64 (operands,)."""
    if all(map(known_on_host, steps)):
        known = {int(step) for step in steps}
        if len(known) == 1:
            return known.pop() + 1
    return next_steps(steps, device)


def next_steps(steps: Sequence[Tensor], device: torch.device) -> Tensor:
    """The step about to be taken by each, from 1: int64 (n,) on `device`."""
    if all(map(known_on_host, steps)):
        return torch.tensor([int(step) + 1 for step in steps]).to(device, non_blocking=True)
    return torch.stack([step.to(device) for step in steps]).to(torch.int64) + 1


def _indices(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)
