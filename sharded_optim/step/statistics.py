"""Exact sums of per-tensor statistics over all ranks. Used by kernel calls and `agree`.

Integer sums do not depend on the order and grouping of the additions, and so not on the sharding of the tensors:

    q = round_half_even(statistic * 2**k)  in int64, with k from `fraction_bits`
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharded_optim.sharding.layout import Slots
from sharded_optim.step.compared import ComparedPieces
from sharded_optim.storage.devices import send

__all__ = ["Contribution", "FixedPoint", "fraction_bits"]

# A float64 below 2**51 is rounded to an integer, half to even, by adding 1.5 * 2**52 and reading the low bits. This is fast even on
# processors without a conversion from floating point to 64-bit integers.
TERM_BITS = 51
SUM_BITS = 62  # the 64 bits of an int64 without its sign bit and one bit of headroom for roundings
HEADROOM = 1.001  # a computed statistic exceeds its mathematical bound by a few fp32 roundings, never by this factor


def fraction_bits(bound: float, numel: int) -> int:
    """Return k, the number of fraction bits with which a statistic in [0, bound] sums over `numel` elements without overflow.

    The error of the mean is at most 2**-(k+1). StableAdamW with beta2 = 0.99 has k = 44 up to 2**11 elements, 35 at 2**20 and 24 at 2**31.
    """
    integer_bits = math.frexp(bound * HEADROOM**2)[1]  # 2**integer_bits exceeds HEADROOM**2 * bound, which exceeds the limit in fp32
    return min(TERM_BITS, SUM_BITS - max(numel - 1, 0).bit_length()) - integer_bits


@dataclass(frozen=True, kw_only=True, eq=False)
class FixedPoint:
    """The fixed-point formats in which the statistics of several pieces are summed."""

    bits: Tensor  # int64 (n,) on the CPU: k, the number of fraction bits; 0 without a statistic
    limits: Tensor  # fp32 (n,) on the device: the largest possible value of the statistic
    scales: Tensor  # fp32 (n,) on the device: 2**k
    units: Tensor  # float64 (n,) on the device: 2**-k
    numels: Tensor  # float64 (n,) on the device: number of elements of the whole tensor, at least 1

    @classmethod
    def of(cls, bounds: Sequence[float], numels: Sequence[int], device: torch.device) -> FixedPoint:
        """Build the formats for statistics in [0, bound] over tensors with these numbers of elements; bound 0 means no statistic."""
        bits = [fraction_bits(bound, numel) if bound else 0 for bound, numel in zip(bounds, numels, strict=True)]
        on_host = {"device": "cpu", "dtype": torch.float64}
        doubles = torch.tensor([[math.ldexp(1.0, -k) for k in bits], [max(numel, 1) for numel in numels]], **on_host)
        singles = torch.tensor([[HEADROOM * bound for bound in bounds], [math.ldexp(1.0, k) for k in bits]], **on_host).float()
        (units, numels_on_device), (limits, scales) = send(doubles, device), send(singles, device)
        return cls(bits=torch.tensor(bits, device="cpu"), limits=limits, scales=scales, units=units, numels=numels_on_device)


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """The contribution of n pieces of this rank to an agreement."""

    places: Slots  # the slots of the pieces in the layout
    fixed_point: FixedPoint  # the formats of the sums
    compared: ComparedPieces  # the values that must be the same on all ranks that hold pieces of a tensor
    difference: int  # see `ComparedPieces.difference`
    observed: Tensor  # int64 (2, n) on the device: the sum of q over each piece, and 1 if an element was not finite
    is_early: bool = False  # whether the gradients were observed before the step
