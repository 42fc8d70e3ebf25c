"""Random numbers for stochastic rounding, a function of the seed, the tensor's name, the step and the element's index in the whole tensor
alone: the same bits whatever the sharding, the backend and the order of evaluation.

A counter-based generator (Salmon et al. 2011): SplitMix64 mixes a counter. The engine computes keys, and backends draw with them.
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

RESOLUTION = 24  # bits of a random number: the most that fp32 represents in [0, 1) with equal spacing


def sources(seeds: Sequence[int], names: Sequence[str]) -> Tensor:
    """Hash the seed and the name of each of n tensors: int64 (n,) on the CPU.

    Args:
        seeds: rounding seed of each tensor.
        names: name of each tensor, the same on every rank; wrapper prefixes are ignored.
    """
    hashes = [
        signed(int.from_bytes(hashlib.blake2b(f"{seed}/{without_wrappers(name)}".encode(), digest_size=8).digest(), "little"))
        for seed, name in zip(seeds, names, strict=True)
    ]
    return torch.tensor(hashes, dtype=torch.int64, device="cpu")


def keys(sources: Tensor, steps: Tensor) -> Tensor:
    """Compute the keys of n tensors for `uniform`: int64 (n,).

    Args:
        sources: the results of `sources`: int64 (n,).
        steps: number of the coming step: int64 (n,) or ().
    """
    return mix(sources + steps * GOLDEN)


def uniform(key: Tensor, segment: Segment) -> Tensor:
    """Draw a multiple of 2**-24 in [0, 1) for each element of a segment: fp32 (segment.numel,), in the segment's order.

    Args:
        key: a key from `keys`: int64 ().
        segment: the elements of the tensor.
    """
    runs = send(segment.run_starts(), key.device)
    indices = (runs[:, None] + torch.arange(segment.run, device=key.device)).flatten()
    return shift_right(mix(key + indices * GOLDEN), 64 - RESOLUTION).to(torch.float32) * 2.0**-RESOLUTION
