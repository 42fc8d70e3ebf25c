"""The math of an optimizer: plain functions over scalars or tensors.

`Algorithm` is what a backend runs. The optimizers themselves, a file each, are in `optimizers/`.

Rules for `update` and `observe`, which every backend compiles from the same source, as it does `load` and `store` of a storage format:
`+ - *`, comparisons, numbers and the functions of `operations` only; every value is fp32, of numbers too; one result rounding per operation
(no fused multiply-add).

Rule for `coefficients` and `lr_scale`: `+ - *` and the functions of `scalars` only, for all that may depend on step or learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharded_optim.formulas.scalars import Number, Step

__all__ = ["Algorithm", "Choose", "Coefficients", "Matrix", "Statistic"]

Coefficients = tuple[Number, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistic:
    """The mean of an elementwise value over a whole tensor, which an algorithm needs before it can update any element.

    The engine sums `observe` over all ranks and hands the mean over the tensor to `lr_scale`.
    """

    observe: Callable[..., Any]  # (grad, *state, *coefficients) -> the value, in [0, bound], of zeros zero; writes nothing
    coefficients: Callable[[Mapping[str, Any], Step], Coefficients]  # (hyperparameters, step)
    bound: Callable[[Mapping[str, Any]], float]  # the largest value that `observe` can give with these hyperparameters, at any step
    lr_scale: Callable[[Mapping[str, Any], Number], Number]  # (hyperparameters, which it reads by [], mean) -> multiplier of lr


@dataclass(frozen=True, kw_only=True, eq=False)
class Matrix:
    """A function of whole matrices, between two elementwise passes over the pieces that a rank holds.

    The algorithm's `update` is the first pass: in the place of the parameter it writes an element of a *direction*, and the state. One rank
    gets the direction of a whole matrix and computes `function`. The result goes back to all ranks that hold a piece of the matrix, where
    `apply` updates the parameter by it.
    """

    # (shape of a tensor, hyperparameters) -> (rows, columns) of the matrices that its elements are, in row-major order one after the other.
    # Raises ValueError for a shape that cannot be stepped, and says why.
    shapes: Callable[[tuple[int, ...], Mapping[str, Any]], Sequence[tuple[int, int]]]
    function: Callable[[Tensor, Mapping[str, Any]], Tensor]  # (direction (rows, columns), hyperparameters) -> result, alike
    flops: Callable[[int, int], int]  # (rows, columns) -> of `function`, up to a factor: ranks share the work by it
    dtype: torch.dtype  # of directions and results, also between ranks
    apply: Algorithm  # without state; its `grad` is the result


@dataclass(frozen=True, kw_only=True, eq=False)
class Algorithm:
    """The math of one optimizer: elementwise, except for its statistic or its function of whole matrices."""

    name: str
    state: tuple[str, ...]  # names of the per-element state, in the order the functions take and return it; the first moment first
    update: Callable[..., tuple[Any, ...]]  # (param, grad, *state, *coefficients) -> (param, *state)
    coefficients: Callable[[Mapping[str, Any], Step, Number], Coefficients]  # (hyperparameters, step, lr_scale)
    # (param, grad, *state, *coefficients) -> the parameter before an update that led to this parameter and state; for reports. None: what
    # an update has subtracted is not reported.
    undo: Callable[..., Any] | None
    statistic: Statistic | None = None
    matrix: Matrix | None = None
    optional_state: frozenset[str] = frozenset()  # state that may begin, as zeros, when other state has long begun
    ignored_state: frozenset[str] = frozenset()  # state that other hyperparameters would need, which may be left over


# The algorithm of a param group. Raises ValueError for hyperparameters that do not go together, or ask for what is not done.
Choose = Callable[[Mapping[str, Any]], Algorithm]
