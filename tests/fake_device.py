"""A CPU that counts as a device for which the host must not wait: the fixture `cpu_is_a_device` in conftest.py."""

from __future__ import annotations

import torch


class FakeEvent:
    """An event of a device; counts how often the host waited."""

    waits = 0

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"

    def record(self) -> None:
        """Nothing to record."""

    def synchronize(self) -> None:
        FakeEvent.waits += 1
