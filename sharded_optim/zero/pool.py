"""A pool of flat buffers for reuse: new memory would have to be mapped page by page."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sharded_optim.zero.transfers import Transfer

__all__ = ["Pool"]


class Pool:
    """Flat buffers, each of which is in use or free.

    Args:
        make: allocates a buffer if no free one is large enough.
    """

    def __init__(self, make: Callable[[int, torch.dtype, torch.device], Tensor]) -> None:
        self._make = make
        self._free: list[tuple[Tensor, Transfer]] = []

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised buffer: (numel,)."""
        size = numel * dtype.itemsize
        fitting = [entry for entry in self._free if entry[0].device == device and entry[0].untyped_storage().nbytes() >= size]
        # If none fits, one is freed, so that there are never more than were in use together.
        candidates = fitting or self._free[-1:]
        buffer, transfer = min(candidates, key=lambda entry: entry[0].untyped_storage().nbytes(), default=(None, Transfer()))
        self._free = [entry for entry in self._free if entry[0] is not buffer]
        transfer.settle()
        if buffer is None or not fitting:
            return self._make(numel, dtype, device)
        return torch.empty(0, dtype=dtype, device=device).set_(buffer.untyped_storage(), 0, (numel,), (1,))

    def give(self, buffer: Tensor, transfer: Transfer) -> None:
        """Return a buffer to the pool, for reuse once the transfer has ended on all ranks."""
        self._free.append((buffer, transfer))
