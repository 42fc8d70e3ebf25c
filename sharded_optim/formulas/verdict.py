"""Decide whether a step happens, from one vector of integers that all ranks have summed: a few values for each tensor of the model.

`judge` is the definition, in torch operations. A backend may compile its function `agrees` into a kernel that does the same in one launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "ABSENT",
    "BITS",
    "FOUND_INF",
    "INVALID",
    "KEY",
    "NON_FINITE",
    "PRESENT",
    "REPLACES",
    "SECTIONS",
    "SQUARED_KEY",
    "TAIL",
    "TOTAL",
    "Verdict",
    "agrees",
    "judge",
]

# Rows of the vector, one column per tensor.
SECTIONS = 7
TOTAL = 0  # sum of q over the owned pieces
NON_FINITE = 1  # ranks on which the gradient, or the statistic, was not finite; who holds several pieces counts for each
ABSENT = 2  # ranks that hold a piece without a gradient
PRESENT = 3  # ranks that hold a piece with a gradient
BITS = 4  # sum of k over the ranks in PRESENT
KEY = 5  # sum of the hyperparameters' keys over the ranks in PRESENT
SQUARED_KEY = 6  # and of their squares: all ranks have the same key if and only if PRESENT * SQUARED_KEY == KEY**2
TAIL = 3  # after the rows:
REPLACES = -3  # ranks whose parameters are not those of this vector any more, so that all must make a new layout
INVALID = -2  # ranks that met bad input
FOUND_INF = -1  # ranks on which GradScaler found an infinite gradient


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The decision about a step; the same on each rank."""

    flags: Tensor  # int64 (3,): whether ranks are consistent, whether all is finite, and whether no GradScaler found an infinite gradient
    proceed: Tensor  # bool (), whether the step happens


def agrees(absent, present, key, squared_key):
    """Return, for each tensor, whether all ranks that hold it have a gradient or none has, with equal hyperparameters and step counters."""
    return present * (absent + squared_key) == key * key  # who is not in PRESENT adds no key, and no term is negative


def judge(sums: Tensor, *, skips: bool) -> Verdict:
    """Decide about a step from the sums over ranks, without waiting for the device.

    Args:
        sums: int64 (SECTIONS * tensors + TAIL,).
        skips: whether a step that is not finite does not happen.
    """
    vector = sums[:-TAIL].view(SECTIONS, (len(sums) - TAIL) // SECTIONS)
    no_new_params, valid, no_inf = (sums[-TAIL:] == 0).unbind()
    finite = (vector[NON_FINITE] == 0).all()
    consistent = agrees(vector[ABSENT], vector[PRESENT], vector[KEY], vector[SQUARED_KEY]).all() & valid & no_new_params
    proceed = consistent & no_inf
    return Verdict(
        flags=torch.stack([consistent, finite, no_inf]).to(torch.int64),
        proceed=proceed & finite if skips else proceed,
    )
