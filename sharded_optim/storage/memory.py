"""Allocate CPU memory on large pages. A step streams through all of its memory, and large pages save most address translations.

Linux gives 2 MiB pages to a process that asks before it first touches the memory (transparent huge pages, if they are set to `always` or
`madvise`). Optimizer state is allocated so; parameters and gradients only if `zeros` has allocated their memory, as in `zero/` where
ranks share no memory.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

__all__ = ["LARGE_PAGE", "with_own_storage", "zeros", "zeros_on"]

LARGE_PAGE = 2 * 2**20  # bytes


def zeros(numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Allocate zeros on the CPU: (numel,), on large pages except for a last part that does not fill one. The storage cannot be resized."""
    size = numel * dtype.itemsize
    if size < LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(numel, dtype=dtype, device="cpu")
    try:
        memory = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        offset = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % LARGE_PAGE
        memory.madvise(mmap.MADV_HUGEPAGE, offset, size // LARGE_PAGE * LARGE_PAGE)  # the rest is on small pages
    except OSError:  # the operating system has no large pages
        return torch.zeros(numel, dtype=dtype, device="cpu")
    return torch.frombuffer(memory, dtype=dtype, count=numel, offset=offset)


def zeros_on(device: torch.device, numel: int, dtype: torch.dtype) -> Tensor:
    """Allocate zeros on any device: (numel,). On a CPU by `zeros`."""
    return zeros(numel, dtype) if device.type == "cpu" else torch.zeros(numel, dtype=dtype, device=device)


def with_own_storage(part: Tensor) -> Tensor:
    """Return a tensor on the same memory, with a storage that covers only this tensor and keeps the memory alive.

    torch.save writes whole storages, and safetensors refuses tensors that share one.
    """
    return torch.from_dlpack(part.detach())
