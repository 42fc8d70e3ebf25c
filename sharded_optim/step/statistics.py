"""Exact sums of per-tensor statistics over all ranks.

Integers make a sum independent of the order and the grouping of the additions, that is of how the tensors are sharded:

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

# A float64 below 2**51 is rounded to an integer, half to even, by adding 1.5 * 2**52 and reading the low bits: processors without a
# conversion from floating point to 64-bit integers keep their full speed.
TERM_BITS = 51
SUM_BITS = 62  # of an int64: a sign bit, and one of headroom for roundings
HEADROOM = 1.001  # a computed statistic exceeds its mathematical bound by a few fp32 roundings, never by this much


def fraction_bits(bound: float, numel: int) -> int:
    """Return k, the number of fraction bits with which a statistic in [0, bound] sums over `numel` elements without overflow.

    The error of the mean is at most 2**-(k+1). StableAdamW with beta2 = 0.99 has k = 44 up to 2**11 elements, 35 at 2**20 and 24 at 2**31.
    """
    integer_bits = math.frexp(bound * HEADROOM**2)[1]  # bound < 2**integer_bits, and the limit in fp32, which is below HEADROOM**2 * bound
    return min(TERM_BITS, SUM_BITS - max(numel - 1, 0).bit_length()) - integer_bits


@dataclass(frozen=True, kw_only=True, eq=False)
class FixedPoint:
    """The fixed-point formats in which the statistics of several pieces are summed."""

    bits: Tensor  # int64 (n,) on the CPU, k of each; 0 of what has no statistic
    limits: Tensor  # fp32 (n,) on the device, the largest value that is possible
    scales: Tensor  # fp32 (n,) on the device, 2**k
    units: Tensor  # float64 (n,) on the device, 2**-k
    numels: Tensor  # float64 (n,) on the device, of the whole tensors, but at least 1

    @classmethod
    def of(cls, bounds: Sequence[float], numels: Sequence[int], device: torch.device) -> FixedPoint:
        """Build the formats for statistics in [0, bound] of tensors with these numbers of elements; bound 0 means that there is none."""
        bits = [fraction_bits(bound, numel) if bound else 0 for bound, numel in zip(bounds, numels, strict=True)]
        on_host = {"device": "cpu", "dtype": torch.float64}
        doubles = torch.tensor([[math.ldexp(1.0, -k) for k in bits], [max(numel, 1) for numel in numels]], **on_host)
        singles = torch.tensor([[HEADROOM * bound for bound in bounds], [math.ldexp(1.0, k) for k in bits]], **on_host).float()
        (units, numels_on_device), (limits, scales) = send(doubles, device), send(singles, device)
        return cls(bits=torch.tensor(bits, device="cpu"), limits=limits, scales=scales, units=units, numels=numels_on_device)


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """The contribution of some pieces of this rank to an agreement."""

    places: Slots  # which they are
    fixed_point: FixedPoint  # of the sum of each
    compared: ComparedPieces  # what must be the same on all ranks that hold pieces of a tensor
    difference: int  # see `ComparedPieces.difference`
    observed: Tensor  # int64 (2, n) on the device: each one's sum of q, and 1 where an element was not finite
    is_early: bool = False  # whether the gradients were observed before the step
