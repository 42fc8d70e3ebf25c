"""The meter of the training job's speed."""

from __future__ import annotations

import time

import pytest
import torch

from launch import train

SECONDS = 0.05  # that a device takes for a step, though the host goes on at once


class Queued:
    """A sum of losses on a device, whose work is done when the value is read."""

    def __init__(self) -> None:
        self.steps = 0

    def __iadd__(self, loss: torch.Tensor) -> Queued:
        self.steps += 1
        return self

    def double(self) -> Queued:
        return self

    def zero_(self) -> None:
        pass

    def item(self) -> float:
        time.sleep(SECONDS * self.steps)
        self.steps = 0
        return 1.0


def test_the_speed_counts_the_work_that_the_device_has_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.dist, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(train.dist, "get_world_size", lambda: 1)
    meter = train.Meter(100, torch.device("cpu"))
    meter._loss = Queued()  # type: ignore[assignment]
    for _ in range(2):
        for _ in range(3):
            meter.count(torch.zeros(()))
        _, tokens_per_second = meter.read()
        assert tokens_per_second <= 100 / SECONDS
    assert meter.overall_tokens_per_second() <= 100 / SECONDS
