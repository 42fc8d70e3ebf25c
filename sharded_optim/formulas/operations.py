"""The operations, besides `+ - *` and comparisons, that an algorithm's math and a storage format may use, and what they mean.

Algorithms and formats import this module as `xp`. This torch version is the definition and serves the eager backend; a backend that
compiles binds `xp` to its own module with the same names. All are correctly rounded (IEEE 754), which is what makes backends bitwise equal.
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
    """Square root, rounded once. torch's own is MKL's on a CPU, and off by a unit in the last place for a fifth of all fp32 values.

    The root of an fp32 value is never so near the middle of two others that the last bit of float64 could turn the rounding.
    """
    return torch.sqrt(values.double()).to(values.dtype)


# ------------------------------------------------------------------------------------------------------------------------ storage


def from_bf16(stored: Tensor) -> Tensor:
    """Elements of a bfloat16 array as fp32."""
    return stored.to(torch.float32)


def to_bf16(value: Tensor) -> Tensor:
    """Elements of a bfloat16 array, rounded to nearest, ties to even (IEEE 754 roundTiesToEven)."""
    return value.to(torch.bfloat16)


def stochastic_bf16(value: Tensor, uniform: Tensor | float) -> Tensor:
    """One of the two bfloat16 numbers next to an fp32 value, as fp32; the value, where it is one or is not finite.

    It is the one away from zero with a probability equal to the distance from the other, in units of their distance.

    Args:
        uniform: a random number in [0, 1); 1 rounds toward zero.
    """
    return _stochastic(value, uniform, torch.finfo(torch.bfloat16))


def from_fp16(stored: Tensor) -> Tensor:
    """Elements of a float16 array as fp32."""
    return stored.to(torch.float32)


def to_fp16(value: Tensor) -> Tensor:
    """Elements of a float16 array, rounded to nearest, ties to even."""
    return value.to(torch.float16)


def stochastic_fp16(value: Tensor, uniform: Tensor | float) -> Tensor:
    """As `stochastic_bf16`, for float16."""
    return _stochastic(value, uniform, torch.finfo(torch.float16))


def _stochastic(value: Tensor, uniform: Tensor | float, limits: torch.finfo) -> Tensor:
    magnitude = value.abs()
    power = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32)  # the largest power of two that is not above the magnitude
    spacing = (power * limits.eps).clamp(min=limits.smallest_normal * limits.eps)  # a power of two: nothing below rounds
    scaled = magnitude / spacing
    below = scaled.floor()
    rounded = (below + (uniform < scaled - below)) * spacing
    return torch.where(value.isfinite(), torch.copysign(rounded, value), value)
