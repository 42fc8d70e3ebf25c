"""Decide whether a step happens, from one all-reduced int64 vector with two values for each tensor of the model.

`contribute`, `judge` and `advance` are the reference, in torch operations. Backends may have kernels that do the same in one launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "DIFFERENCE",
    "FOUND_INF",
    "INVALID",
    "NON_FINITE",
    "NON_FINITE_PIECE",
    "REPLACES",
    "SECTIONS",
    "TAIL",
    "TOTAL",
    "Verdict",
    "advance",
    "contribute",
    "judge",
]

# Rows of the vector, one column per tensor.
SECTIONS = 2
TOTAL = 0  # sum of q over the owned pieces
# NON_FINITE_PIECE times the number of pieces whose gradient or statistic was not finite, minus k + 1 if the tensor has a gradient, where k
# is the number of fraction bits. So it is positive if and only if something was not finite.
NON_FINITE = 1
NON_FINITE_PIECE = 2**32
TAIL = 4  # number of values after the rows, at these indices:
DIFFERENCE = -4  # weighted sum of hashes, modulo 2**64: 0 if hyperparameters, options, steps and missing gradients are equal on all ranks
REPLACES = -3  # number of ranks whose parameters are no longer those of this vector, so that all ranks must build a new layout
INVALID = -2  # number of ranks with bad input
FOUND_INF = -1  # number of ranks on which GradScaler found an infinite gradient


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The decision about a step; the same on every rank."""

    flags: Tensor  # int64 (3,): the ranks are consistent; everything is finite; no GradScaler found an infinite gradient
    proceed: Tensor  # bool (): the step happens


def contribute(
    vector: Tensor,  # int64 (SECTIONS * tensors + TAIL,): this rank's vector, added to in place
    observed: Tensor,  # int64 (2, n): the sum of q over each piece, and 1 if an element was not finite
    counted: Tensor,  # int64 (2, n): factors of `observed`; see `Slots`
    slots: Tensor,  # int64 (n,): column of each piece's tensor
) -> None:
    """Add the observations of n pieces to this rank's vector."""
    vector[:-TAIL].view(SECTIONS, -1).index_add_(1, slots, observed * counted)


def judge(sums: Tensor, *, skips: bool) -> Verdict:
    """Decide about a step from the sums over ranks, without waiting for the device.

    Args:
        sums: the all-reduced vector: int64 (SECTIONS * tensors + TAIL,).
        skips: whether a non-finite step is skipped.
    """
    vector = sums[:-TAIL].view(SECTIONS, (len(sums) - TAIL) // SECTIONS)
    no_difference, no_new_params, valid, no_inf = (sums[-TAIL:] == 0).unbind()
    finite = (vector[NON_FINITE] <= 0).all()
    consistent = no_difference & no_new_params & valid
    proceed = consistent & no_inf
    return Verdict(
        flags=torch.stack([consistent, finite, no_inf]).to(torch.int64),
        proceed=proceed & finite if skips else proceed,
    )


def advance(steps: Tensor, happens: Tensor | None) -> None:
    """Increment step counters if the step happens.

    Args:
        steps: fp32, any shape; written in place.
        happens: bool (), whether the step happens; None means that it does.
    """
    steps += 1.0 if happens is None else happens
