"""The math of the optimizers: plain functions over scalars or tensors, one file per algorithm.

`Algorithm` is what a backend runs. To add an optimizer, write its functions in a new file here and a public class in `optimizers.py`.

Rules for `observe` and `update`, which every backend compiles from the same source:
`+ - *` and the functions of `operations` only; every value is fp32; one result rounding per operation (no fused multiply-add).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Algorithm", "Coefficients", "Number"]

Number = float | Tensor  # a Python float, or a float64 tensor of one value per local parameter
Coefficients = tuple[Number, ...]


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One optimizer's math.

    `update` is elementwise. `observe`, where an algorithm has one, is elementwise too and gives the value whose mean over the *whole* tensor
    the algorithm needs; the engine sums it over all ranks and hands the mean to `lr_scale`.
    """

    name: str
    state: tuple[str, ...]  # names of the per-element state, in the order the functions take and return it

    update: Callable[..., tuple[Any, ...]]  # (param, grad, *state, *coefficients) -> (param, *state)
    update_coefficients: Callable[[Mapping[str, Any], int | Tensor, Number], Coefficients]  # (hyperparameters, step, lr_scale)

    observe: Callable[..., Any] | None = None  # (grad, *state, *coefficients) -> statistic, in [0, bound]
    observe_coefficients: Callable[[Mapping[str, Any], int | Tensor], Coefficients] | None = None  # (hyperparameters, step)
    observe_bound: Callable[[Mapping[str, Any]], float] | None = None  # the largest value `observe` can give, at any step
    lr_scale: Callable[[Tensor], Tensor] | None = None  # mean statistic, float64 (n,) -> multiplier of the learning rate, float64 (n,)
