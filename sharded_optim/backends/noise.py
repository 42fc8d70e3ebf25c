"""Random numbers for stochastic rounding that depend on the seed, the tensor's name, the step and the element's index in the whole tensor,
and on nothing else: the same bits whatever the sharding, the backend and the order of evaluation.

A counter-based generator (Salmon et al. 2011): SplitMix64 mixes a counter. Used by the engine, which makes the keys, and by backends, which
draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_optim.sharding.names import without_wrappers
from sharded_optim.sharding.segment import Segment
from sharded_optim.storage.devices import send
from sharded_optim.storage.splitmix64 import GOLDEN, mix, shift_right, signed

__all__ = ["keys", "sources", "uniform"]

RESOLUTION = 24  # bits of a drawn number: all that fp32 holds below 1


def sources(seeds: Sequence[int], names: Sequence[str]) -> Tensor:
    """Compute a seed for each of n tensors: int64 (n,) on the CPU.

    Args:
        seeds: of each tensor.
        names: of each tensor, the same on every rank; wrappers' prefixes do not matter.
    """
    found = [
        signed(int.from_bytes(hashlib.blake2b(f"{seed}/{without_wrappers(name)}".encode(), digest_size=8).digest(), "little"))
        for seed, name in zip(seeds, names, strict=True)
    ]
    return torch.tensor(found, dtype=torch.int64, device="cpu")


def keys(sources: Tensor, steps: Tensor) -> Tensor:
    """Compute the keys of n tensors for `uniform`: int64 (n,).

    Args:
        sources: int64 (n,), see above.
        steps: the step each is about to take, int64 (n,) or ().
    """
    return mix(sources + steps * GOLDEN)


def uniform(key: Tensor, segment: Segment) -> Tensor:
    """Draw a number in [0, 1) for each element of a segment, a multiple of 2**-24: fp32 (segment.numel,), in the segment's order.

    Args:
        key: int64 (), from `keys`.
        segment: which elements of the tensor are drawn for.
    """
    runs = send(segment.run_starts(), key.device)
    indices = (runs[:, None] + torch.arange(segment.run, device=key.device)).flatten()
    return shift_right(mix(key + indices * GOLDEN), 64 - RESOLUTION).to(torch.float32) * 2.0**-RESOLUTION
