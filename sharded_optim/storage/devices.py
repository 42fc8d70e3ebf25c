"""Send host values to a device without waiting for it, and keep them alive as long as a CUDA graph reads them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["DeviceCache", "capturing", "keep", "known_on_host", "on", "refuse_to_capture", "send"]

_replayed: list[Any] = []
T = TypeVar("T")


def send(values: Tensor, device: torch.device) -> Tensor:
    """Copy host values to a device, for the kernels launched after this call. The values must not change afterwards."""
    if device.type in ("cpu", "meta"):
        return values.to(device, non_blocking=True)
    pinned = values.pin_memory()  # else the host would wait for the copy
    keep(device, pinned)
    return pinned.to(device, non_blocking=True)


def known_on_host(tensor: Tensor) -> bool:
    """Return whether the host can read the values without waiting for a device."""
    return tensor.is_cpu


def capturing(device: torch.device) -> bool:
    """Return whether kernels are being recorded into a CUDA graph instead of running."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_to_capture(device: torch.device) -> None:
    """Raise ValueError if a CUDA graph is being recorded: every replay would repeat the setup that a step does only once."""
    if capturing(device):
        raise ValueError(
            "a CUDA graph records a step of other parameters, gradients, state or options than the step before, which every replay would "
            "set up anew; take such a step before the capture"
        )


class DeviceCache(Generic[T]):
    """Caches device tensors that are built from host values, until these values change."""

    def __init__(self) -> None:
        self._known: tuple[Any, T] | None = None

    def of(self, values: Any, device: torch.device, make: Callable[[], T]) -> T:
        """Return the cached result for these values, or call `make` and cache its result."""
        known = self._known
        if known is None or known[0] != (values, device):
            made = make()
            if capturing(device):  # the tensor has no values before a replay
                return made
            self._known = known = (values, device), made
        keep(device, known[1])
        return known[1]


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Context in which this device is the current device, so that kernels and events go to its current stream."""
    return nullcontext() if device.type in ("cpu", "meta") else torch.get_device_module(device).device(device)


def keep(device: torch.device, *read: Any) -> None:
    """If a CUDA graph is recorded, keep what it reads, or objects that have it, until the process ends: a graph does not keep it alive."""
    if capturing(device):
        _replayed.extend(read)
