"""The operations that algorithms and storage formats may use besides `+ - *` and comparisons, defined in torch.

Algorithms and formats import this module as `xp`. It is the reference, and the eager backend runs it; a compiling backend binds `xp` to
its own module with the same names. All operations are correctly rounded (IEEE 754), which makes the backends bitwise equal.
"""

from __future__ import annotations

import torch
from torch import Tensor, divide, maximum, where

__all__ = [
    "divide",
    "from_bf16",
    "from_fp16",
    "maximum",
    "sqrt",
    "stochastic_bf16",
    "stochastic_fp16",
    "to_bf16",
    "to_fp16",
    "where",
]


def sqrt(values: Tensor) -> Tensor:
    """Return the correctly rounded fp32 square root, computed in float64. On a CPU torch's own (MKL) is off by one ulp for a fifth of all
    fp32 values.

    Rounding the float64 root is correct: no root of an fp32 value is so close to the midpoint of two fp32 values that an error in the last
    bit of float64 could change its rounding.
    """
    return torch.sqrt(values.double()).to(values.dtype)


# ------------------------------------------------------------------------------------------------------------------------ storage


def from_bf16(stored: Tensor) -> Tensor:
    """Convert stored bfloat16 elements to fp32."""
    return stored.to(torch.float32)


def to_bf16(value: Tensor) -> Tensor:
    """Round fp32 values to bfloat16 elements: to nearest, ties to even (IEEE 754 roundTiesToEven)."""
    return value.to(torch.bfloat16)


def stochastic_bf16(value: Tensor, uniform: Tensor | float) -> Tensor:
    """Round an fp32 value to one of the two nearest bfloat16 numbers, as fp32. Exact and non-finite values are unchanged.

    The probability of rounding away from zero is the value's distance from the other neighbour, as a fraction of their spacing.

    Args:
        uniform: random number in [0, 1); 1 always rounds toward zero.
    """
    return _stochastic(value, uniform, torch.finfo(torch.bfloat16))


def from_fp16(stored: Tensor) -> Tensor:
    """Convert stored float16 elements to fp32."""
    return stored.to(torch.float32)


def to_fp16(value: Tensor) -> Tensor:
    """Round fp32 values to float16 elements: to nearest, ties to even."""
    return value.to(torch.float16)


def stochastic_fp16(value: Tensor, uniform: Tensor | float) -> Tensor:
    """Round to float16 as `stochastic_bf16` rounds to bfloat16."""
    return _stochastic(value, uniform, torch.finfo(torch.float16))


def _stochastic(value: Tensor, uniform: Tensor | float, limits: torch.finfo) -> Tensor:
    magnitude = value.abs()
    power = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32)  # largest power of two <= magnitude
    spacing = (power * limits.eps).clamp(min=limits.smallest_normal * limits.eps)  # a power of two: exact to divide by
    scaled = magnitude / spacing
    below = scaled.floor()
    rounded = (below + (uniform < scaled - below)) * spacing
    return torch.where(value.isfinite(), torch.copysign(rounded, value), value)
