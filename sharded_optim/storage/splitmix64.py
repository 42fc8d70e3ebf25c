"""SplitMix64 (Steele, Lea & Flood 2014): a bijective mix of 64-bit integers, used for rounding noise and position hashes.

All arithmetic is that of int64 modulo 2**64.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["GOLDEN", "MULTIPLIER_1", "MULTIPLIER_2", "mix", "shift_right", "signed"]


def signed(value: int) -> int:
    """Return the int64 that is equal to `value` modulo 2**64."""
    return (value + 2**63) % 2**64 - 2**63


GOLDEN = signed(0x9E3779B97F4A7C15)  # the increment between two counters
MULTIPLIER_1 = signed(0xBF58476D1CE4E5B9)
MULTIPLIER_2 = signed(0x94D049BB133111EB)


def shift_right(
    bits: Tensor,  # int64, any shape
    by: int,
) -> Tensor:  # int64, of the same shape
    """Shift right and fill with zeros; torch's shift of int64 would fill with the sign bit."""
    return (bits >> by) & (2 ** (64 - by) - 1)


def mix(
    bits: Tensor,  # int64, any shape
) -> Tensor:  # int64, of the same shape
    bits = (bits ^ shift_right(bits, 30)) * MULTIPLIER_1
    bits = (bits ^ shift_right(bits, 27)) * MULTIPLIER_2
    return bits ^ shift_right(bits, 31)
