"""One step without an optimizer object, for the static methods `adamw` and `sgdw`, which have the signatures of Composer's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_optim.backends import MODULES, Operands, choose
from sharded_optim.formulas import Algorithm
from sharded_optim.sharding import check_memory, describe
from sharded_optim.step.coefficients import OperandGroups, coefficient_table, host_numbers

__all__ = ["counter", "update"]


def counter(step: Tensor | float) -> Tensor:
    """Convert a step counter to a float32 CPU tensor, whatever torch's default dtype and device are; return a tensor unchanged."""
    return step if isinstance(step, Tensor) else torch.tensor(step, dtype=torch.float32, device="cpu")


@torch.no_grad()
def update(
    algorithm: Algorithm,
    group: Mapping[str, Any],  # hyperparameters
    params: Sequence[Tensor],  # any shapes; written
    grads: Sequence[Tensor],  # read-only
    states: Sequence[Sequence[Tensor]],  # for each entry of algorithm.state, one tensor per parameter; written
    steps: Sequence[Tensor],  # each parameter's step counter before this step
) -> None:
    """Step ordinary tensors on this process alone.

    Raises:
        ValueError: lists of different lengths; tensors that do not have their parameter's shape, or cannot be stepped.
    """
    lists = {"grads": grads, **dict(zip(algorithm.state, states, strict=True)), "steps": steps}
    for name, each in lists.items():
        if len(each) != len(params):
            raise ValueError(f"{name} must have one tensor for each of {len(params)} params, got {len(each)}")
    rows = []
    for index, (param, grad, *state) in enumerate(zip(params, grads, *states, strict=True)):
        local = describe(param, f"params[{index}]").local
        named = zip(("parameter", "gradient", *algorithm.state), (param, grad, *state), strict=True)
        rows.append([check_memory(local(tensor, name), name, f"params[{index}]", param.device) for name, tensor in named])
    members = OperandGroups(groups=[host_numbers(group)])
    for (param, grad, *state), step in zip(rows, steps, strict=True):  # only after all tensors have been checked
        operands = Operands.whole([param], [grad], [[each] for each in state])
        backend, _ = choose(MODULES, param.device, frozenset(tensor.dtype for tensor in (param, grad, *state)))
        taken = step.to(param.device, torch.float32).reshape(1)
        table = coefficient_table(algorithm.coefficients, members, taken, 1.0, backend=backend, operands=operands)
        backend.update(algorithm, operands, table, None, None, None)
