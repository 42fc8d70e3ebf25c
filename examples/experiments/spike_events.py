"""Spikes in losses and in the RMS of updates, as `spikes.py` counts them. The rules are those of `sharded_optim.tools.spikes`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sharded_optim.tools import spikes
from sharded_optim.tools.spikes import RMS_THRESHOLD, events, rms_spikes

__all__ = ["FOLLOWS", "RMS_THRESHOLD", "WINDOW", "events", "lags", "loss_spikes", "rises", "rms_spikes"]

WINDOW = 50  # steps of the running mean and deviation
LEAST_STEPS = 2  # above the threshold in a loss spike: one step may be an odd batch
FOLLOWS = range(1, 9)  # lags in steps at which the paper says that a loss spike follows an RMS spike


def loss_spikes(losses: Sequence[float], start: int) -> list[int]:
    """Return the steps, from `start` >= `WINDOW` on, at which loss spikes begin."""
    return spikes.loss_spikes(losses, window=WINDOW, start=start, least=LEAST_STEPS)


def rises(losses: Sequence[float], start: int) -> list[float]:
    """Return how far each loss from `start` >= `WINDOW` on is above the mean of the `WINDOW` before it."""
    return [losses[step] - float(np.mean(losses[step - WINDOW : step])) for step in range(start, len(losses))]


def lags(loss_events: Sequence[int], rms_events: Sequence[int]) -> list[int | None]:
    """Return for each loss spike the steps since the last RMS spike began, 0 if at the same step, None if there was none before."""
    return [min((step - before for before in rms_events if before <= step), default=None) for step in loss_events]
