"""The math of an optimizer: plain functions over scalars or tensors.

A backend runs an `Algorithm`. The optimizers themselves, one file each, are in `optimizers/`.

Rules for `update` and `observe`, which every backend compiles from the same source, like `load` and `store` of a storage format: only
`+ - *`, comparisons, numbers and the functions of `operations`; every value is fp32, constants included; each operation rounds its result
once (no fused multiply-add).

Rule for `coefficients` and `lr_scale`: only `+ - *` and the functions of `scalars` for values that may depend on the step or learning rate.
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

    The engine sums `observe` over all ranks and passes the mean over the tensor to `lr_scale`.
    """

    # (grad, *state, *coefficients) -> value in [0, bound], and 0 where grad and state are 0, whatever the coefficients; writes nothing
    observe: Callable[..., Any]
    coefficients: Callable[[Mapping[str, Any], Step], Coefficients]  # (hyperparameters, step)
    bound: Callable[[Mapping[str, Any]], float]  # hyperparameters -> upper bound of `observe` at any step
    # (hyperparameters, mean) -> factor of lr. Reads hyperparameters by [], so that a missing one is a KeyError: metrics rely on it.
    lr_scale: Callable[[Mapping[str, Any], Number], Number]


@dataclass(frozen=True, kw_only=True, eq=False)
class Matrix:
    """A function of whole matrices, between two elementwise passes over the pieces that a rank holds.

    The algorithm's `update` is the first pass: it writes the state, and an element of a *direction* in place of the parameter. One rank
    gets the direction of a whole matrix and computes `function`. The result goes back to all ranks that hold a piece of the matrix, where
    `apply` updates the parameter with it.
    """

    # (shape of a tensor, hyperparameters) -> (rows, columns) of the consecutive row-major matrices that make up the tensor.
    # Raises ValueError for a shape that cannot be stepped, with the reason.
    shapes: Callable[[tuple[int, ...], Mapping[str, Any]], Sequence[tuple[int, int]]]
    function: Callable[[Tensor, Mapping[str, Any]], Tensor]  # (direction (rows, columns), hyperparameters) -> result (rows, columns)
    flops: Callable[[int, int], int]  # (rows, columns) -> cost of `function`, up to a constant factor; balances the work between ranks
    dtype: torch.dtype  # dtype of directions and results, in memory and between ranks
    apply: Algorithm  # second pass, without state; its `grad` is the result


@dataclass(frozen=True, kw_only=True, eq=False)
class Algorithm:
    """The math of one optimizer: elementwise, except for its statistic or its function of whole matrices."""

    name: str
    state: tuple[str, ...]  # names of the per-element state, in the order the functions take and return it; the first moment first
    update: Callable[..., tuple[Any, ...]]  # (param, grad, *state, *coefficients) -> (param, *state)
    coefficients: Callable[[Mapping[str, Any], Step, Number], Coefficients]  # (hyperparameters, step, lr_scale)
    # (param, grad, *state, *coefficients) -> the parameter before the update that produced this parameter and state; for reports. None: the
    # update cannot be recomputed, and is not reported unless the step measured it.
    undo: Callable[..., Any] | None
    statistic: Statistic | None = None
    matrix: Matrix | None = None
    optional_state: frozenset[str] = frozenset()  # state that may start as zeros at any step
    ignored_state: frozenset[str] = frozenset()  # state that only other hyperparameters need; ignored if present


# Returns the algorithm of a param group: one of a few that are built once, as each object has kernels of its own.
# Raises ValueError for hyperparameters that contradict each other or are not supported.
Choose = Callable[[Mapping[str, Any]], Algorithm]
