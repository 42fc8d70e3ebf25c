"""Hash the bits of a tensor together with their positions, to compare replicas.

A tensor's bytes are read as 64-bit words x, the last one filled up with zeros, in blocks of `BLOCK` words:

    hash = sum over blocks b of  odd(BLOCK + b) * (sum over words i of a block of  (x_i + (x_i >> 32)) * odd(i))   modulo 2**64

with odd(i) an odd 64-bit number mixed from i (splitmix64, Steele et al. 2014). Wrapping integer sums do not depend on the order, so every
device and number of threads gives the same hash. It detects:

- any change of a single word: an odd number times a nonzero difference is not 0. (Except for one pair of values: 0x7fffffff and 0x80000000
  in the upper half, with lower halves one apart, count as equal.)
- two swapped elements of up to 32 bits: within a word always, otherwise except for one in 2**32 pairs of positions. This is why the upper
  half is added to the lower: a sign bit at 2**63 alone would count the same at every position, as all odd multiples of 2**63 are equal.

On a CPU with llvmlite a block is summed in one compiled pass at the speed of reading memory; without it that takes three to five times as
long. The hash is not cryptographic: two different tensors with the same hash are easy to construct.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from sharded_optim.storage.splitmix64 import GOLDEN, mix

__all__ = ["position_hashes"]

WORD = 8  # bytes
BLOCK = 2**16  # words: 512 KiB, so that a block, its weights and its products fit in a core's caches
ON_DEVICE = 32  # blocks per kernel: 16 MiB of temporary memory, and few launches


@torch.no_grad()
def position_hashes(
    tensors: Sequence[Tensor],  # any dtype, shape and strides, on any devices; read-only
) -> Tensor:  # int64 (len(tensors),) on the CPU
    """Hash the elements of each tensor in order. Waits once for each device."""
    hashes = torch.zeros(len(tensors), dtype=torch.int64, device="cpu")
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        numbers = [number for number, tensor in enumerate(tensors) if tensor.device == device]
        hashes[numbers] = _hashes_on(device, [tensors[number] for number in numbers]).cpu()
    return hashes


def _hashes_on(device: torch.device, tensors: Sequence[Tensor]) -> Tensor:
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    # Number of partial sums of each tensor: one per block, and one for an incomplete word at the end.
    counts = [-(-size // (BLOCK * WORD)) + (size % WORD > 0) for size in sizes]
    sums = torch.zeros(sum(counts), dtype=torch.int64, device=device)
    at_once = 1 if device.type == "cpu" else ON_DEVICE
    scratch = torch.empty(at_once, min(BLOCK, max(sizes, default=0) // WORD), dtype=torch.int64, device=device)
    begin = 0
    for tensor, count in zip(tensors, counts, strict=True):
        if count:
            _sum_blocks(tensor, sums[begin : begin + count], scratch)
        begin += count
    counted = torch.tensor(counts, dtype=torch.int64, device="cpu")
    rows = torch.repeat_interleave(torch.arange(len(tensors), device="cpu"), counted)
    first = torch.repeat_interleave(counted.cumsum(0) - counted, counted)
    factors = _odd(BLOCK + torch.arange(len(rows), device="cpu") - first)
    hashes = torch.zeros(len(tensors), dtype=torch.int64, device=device)
    return hashes.index_add_(0, rows.to(device), sums * factors.to(device))


def _sum_blocks(
    tensor: Tensor,
    sums: Tensor,  # int64 (blocks,), written: the sum of each block, and the incomplete word at the end
    scratch: Tensor,  # int64 (blocks at once, words of a block), overwritten
) -> None:
    flat = tensor.detach().reshape(-1).contiguous()  # a copy unless the elements are contiguous
    content = flat.as_strided(flat.shape, (1,)).view(torch.uint8)  # view needs stride 1, but a single element may have any stride
    words = len(content) // WORD
    full = words // BLOCK
    for first in range(0, full, len(scratch)):
        last = min(first + len(scratch), full)
        block = _words(content[first * BLOCK * WORD : last * BLOCK * WORD]).view(-1, BLOCK)
        _sum(block, scratch[: last - first], sums[first:last])
    rest = content[full * BLOCK * WORD : words * WORD]
    if len(rest):
        _sum(_words(rest)[None], scratch[:1, : words - full * BLOCK], sums[full : full + 1])
    if len(content) % WORD:
        end = content.new_zeros(WORD)
        end[: len(content) % WORD] = content[words * WORD :]
        sums[-1:] = end.view(torch.int64)


def _sum(block: Tensor, scratch: Tensor, sums: Tensor) -> None:
    """Sum the words in each row of a block, weighted by their positions, into `sums`. Overwrites `scratch`."""
    weights = _weights(block.device)[: block.shape[1]]
    compiled = _compiled() if block.device.type == "cpu" else None
    if compiled is not None:
        rows, words = block.shape
        for row in range(rows):
            compiled(block.data_ptr() + WORD * words * row, weights.data_ptr(), words, sums.data_ptr() + WORD * row)
        return
    torch.bitwise_right_shift(block, 32, out=scratch)
    torch.sum(scratch.add_(block).mul_(weights), dim=1, out=sums)


@cache
def _compiled() -> Callable[[int, int, int, int], None] | None:
    """Return a version of `_sum` for one row, compiled by LLVM; None without a usable llvmlite."""
    try:
        from sharded_optim.backends.cpu.weighted_sums import weighted_sum
    except ImportError:
        return None
    return weighted_sum()


def _words(content: Tensor) -> Tensor:
    """Reinterpret bytes as int64 words; copies if their offset is not a multiple of a word, which torch requires."""
    return (content.clone() if content.storage_offset() % WORD else content).view(torch.int64)


@cache
def _weights(device: torch.device) -> Tensor:
    return _odd(torch.arange(BLOCK, device="cpu")).to(device)


def _odd(
    numbers: Tensor,  # int64, not negative
) -> Tensor:  # int64, of the same shape
    """Return an odd 64-bit number for each number, mixed by splitmix64."""
    return mix((numbers + 1) * GOLDEN) | 1
