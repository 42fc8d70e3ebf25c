"""The operations, besides `+ - *`, that an algorithm's math may use, and what they mean.

Algorithms import this module as `xp`. This torch version is the definition and serves the eager backend; a backend that compiles the
math binds `xp` to its own module with the same names. All are correctly rounded (IEEE 754), which is what makes backends bitwise equal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, divide, maximum, where

__all__ = ["divide", "maximum", "sqrt", "sqrt_of_scalars", "where"]


def sqrt(values: Tensor) -> Tensor:
    """The root, rounded once. torch's own is MKL's on a CPU, and off by a unit in the last place for a fifth of all fp32 values.

    The root of an fp32 value is never so near the middle of two others that the last bit of float64 could turn the rounding.
    """
    return torch.sqrt(values.double()).to(values.dtype)


def sqrt_of_scalars(values: Tensor) -> Tensor:
    """The roots of a few float64 values, rounded once; not for elements of parameters. On a CPU MKL's is off for one value in seventy."""
    if values.device.type != "cpu":
        return torch.sqrt(values)
    return torch.tensor([math.sqrt(value) for value in values.flatten().tolist()], dtype=torch.float64).view(values.shape)
