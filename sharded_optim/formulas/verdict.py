"""Decide whether a step happens, from one vector of integers that all ranks have summed: two for each tensor of the model.

`contribute`, `judge` and `advance` are the definitions, in torch operations. A backend may have kernels that do the same in one launch.
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
# NON_FINITE_PIECE for each piece whose gradient, or statistic, was not finite; minus k + 1 where the tensor has a gradient, in k fraction
# bits. So it is positive if and only if something was not finite.
NON_FINITE = 1
NON_FINITE_PIECE = 2**32
TAIL = 4  # after the rows:
DIFFERENCE = -4  # a sum of hashes, modulo 2**64, that is 0 where ranks have equal hyperparameters, options, steps and gradients missing
REPLACES = -3  # ranks whose parameters are not those of this vector any more, so that all must make a new layout
INVALID = -2  # ranks that met bad input
FOUND_INF = -1  # ranks on which GradScaler found an infinite gradient


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The decision about a step; the same on each rank."""

    flags: Tensor  # int64 (3,): whether ranks are consistent, whether all is finite, and whether no GradScaler found an infinite gradient
    proceed: Tensor  # bool (), whether the step happens


def contribute(
    vector: Tensor,  # int64 (SECTIONS * tensors + TAIL,), of this rank; added to
    observed: Tensor,  # int64 (2, n): of some pieces, each one's sum of q, and 1 where an element was not finite
    counted: Tensor,  # int64 (2, n), factors of these; see `Slots`
    slots: Tensor,  # int64 (n,), of the pieces' tensors
) -> None:
    """Add what was observed of some pieces."""
    vector[:-TAIL].view(SECTIONS, -1).index_add_(1, slots, observed * counted)


def judge(sums: Tensor, *, skips: bool) -> Verdict:
    """Decide about a step from the sums over ranks, without waiting for the device.

    Args:
        sums: int64 (SECTIONS * tensors + TAIL,).
        skips: whether a step that is not finite does not happen.
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
    """Count a step.

    Args:
        steps: fp32, any shape, written.
        happens: bool (), whether the step happens; None: it does.
    """
    steps += 1.0 if happens is None else happens
