"""How values get to a device without the host having to wait for it, and stay there as long as a CUDA graph reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["capturing", "keep", "send"]

_replayed: list[Any] = []


def send(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host, which nobody changes, on a device, for what is launched there after this."""
    if device.type in ("cpu", "meta"):
        return values.to(device, non_blocking=True)
    pinned = values.pin_memory()  # else the host would wait for the copy
    keep(device, pinned)
    return pinned.to(device, non_blocking=True)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records what is launched instead of running it."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def keep(device: torch.device, *read: Any) -> None:
    """If a CUDA graph is recorded, keep what it reads, or objects that have it, until the process ends: a graph does not keep it alive."""
    if capturing(device):
        _replayed.extend(read)
