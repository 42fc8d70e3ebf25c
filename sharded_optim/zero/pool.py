"""A pool of flat buffers that are used again: new memory would have to be mapped page by page."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sharded_optim.zero.transfers import Transfer

__all__ = ["Pool"]


class Pool:
    """Flat buffers, each of which is in use or free.

    Args:
        make: allocates a buffer where none fits.
    """

    def __init__(self, make: Callable[[int, torch.dtype, torch.device], Tensor]) -> None:
        self._make = make
        self._free: list[tuple[Tensor, Transfer]] = []

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised buffer: (numel,)."""
        size = numel * dtype.itemsize
        fitting = [each for each in self._free if each[0].device == device and each[0].untyped_storage().nbytes() >= size]
        # One that is too small is let go, so that there are never more than were in use together.
        buffer, transfer = min(fitting or self._free[-1:], key=lambda each: each[0].untyped_storage().nbytes(), default=(None, Transfer()))
        self._free = [each for each in self._free if each[0] is not buffer]
        transfer.settle()
        if buffer is None or not fitting:
            return self._make(numel, dtype, device)
        return torch.empty(0, dtype=dtype, device=device).set_(buffer.untyped_storage(), 0, (numel,), (1,))

    def give(self, buffer: Tensor, transfer: Transfer) -> None:
        """Give a buffer back, to be used again when the transfer has ended for other ranks too."""
        self._free.append((buffer, transfer))
