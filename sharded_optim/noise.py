"""Random numbers for stochastic rounding that depend on the seed, the tensor's name, the step and the element's index in the whole tensor,
and on nothing else: the same bits whatever the sharding, the backend and the order of evaluation.

A counter-based generator (Salmon et al. 2011), here SplitMix64 (Steele, Lea & Flood 2014): a bijective mix of a counter. All arithmetic is
that of int64 modulo 2**64. Used by the engine, which makes the keys, and by backends, which draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_optim.devices import send
from sharded_optim.names import without_wrappers
from sharded_optim.segment import Segment

__all__ = ["keys", "sources", "uniform"]

RESOLUTION = 24  # bits of a drawn number: all that fp32 holds below 1


def _signed(value: int) -> int:
    """The int64 of the same bits."""
    return (value + 2**63) % 2**64 - 2**63


GOLDEN = _signed(0x9E3779B97F4A7C15)
MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
MULTIPLIER_2 = _signed(0x94D049BB133111EB)


def _shift_right(bits: Tensor, by: int) -> Tensor:
    """A logical shift; that of int64 would copy the sign."""
    return (bits >> by) & (2 ** (64 - by) - 1)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * MULTIPLIER_1
    bits = (bits ^ _shift_right(bits, 27)) * MULTIPLIER_2
    return bits ^ _shift_right(bits, 31)


def sources(seeds: Sequence[int], names: Sequence[str]) -> Tensor:
    """What tells the numbers of n tensors apart: int64 (n,) on the CPU.

    Args:
        seeds: of each tensor.
        names: of each tensor, the same on every rank; wrappers' prefixes do not matter.
    """
    found = [
        _signed(int.from_bytes(hashlib.blake2b(f"{seed}/{without_wrappers(name)}".encode(), digest_size=8).digest(), "little"))
        for seed, name in zip(seeds, names, strict=True)
    ]
    return torch.tensor(found, dtype=torch.int64, device="cpu")


def keys(sources: Tensor, steps: Tensor) -> Tensor:
    """What `uniform` draws with: int64 (n,), for n tensors.

    Args:
        sources: int64 (n,), see above.
        steps: the step each is about to take, int64 (n,) or ().
    """
    return _mix(sources + steps * GOLDEN)


def uniform(key: Tensor, segment: Segment) -> Tensor:
    """One number in [0, 1) for each element of a segment, a multiple of 2**-24: fp32 (segment.numel,), in the segment's order.

    Args:
        key: int64 (), from `keys`.
        segment: which elements of the tensor are drawn for.
    """
    runs = send(segment.run_starts(), key.device)
    indices = (runs[:, None] + torch.arange(segment.run, device=key.device)).flatten()
    return _shift_right(_mix(key + indices * GOLDEN), 64 - RESOLUTION).to(torch.float32) * 2.0**-RESOLUTION
