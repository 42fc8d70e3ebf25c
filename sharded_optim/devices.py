"""How values get to a device without the host having to wait for it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["capturing", "send"]

_replayed: list[Tensor] = []  # on the host, pinned; a CUDA graph does not keep alive what it reads


def send(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host, which nobody changes, on a device, for what is launched there after this."""
    if device.type in ("cpu", "meta"):
        return values.to(device, non_blocking=True)
    pinned = values.pin_memory()  # else the host would wait for the copy
    if capturing(device):
        _replayed.append(pinned)
    return pinned.to(device, non_blocking=True)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records what is launched instead of running it."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
