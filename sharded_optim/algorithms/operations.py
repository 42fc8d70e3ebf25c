"""The operations, besides `+ - *`, that an algorithm's math may use, and what they mean.

Algorithms import this module as `xp`. This torch version is the definition and serves the eager backend; a backend that compiles the
math binds `xp` to its own module with the same names. All are correctly rounded (IEEE 754), which is what makes backends bitwise equal.
"""

from __future__ import annotations

import torch
from torch import Tensor, divide, maximum, where

__all__ = ["divide", "maximum", "sqrt", "where"]


def sqrt(values: Tensor) -> Tensor:
    """The root, rounded once. torch's own is MKL's on a CPU, and off by a unit in the last place for a fifth of all fp32 values.

    The root of an fp32 value is never so near the middle of two others that the last bit of float64 could turn the rounding.
    """
    return torch.sqrt(values.double()).to(values.dtype)
