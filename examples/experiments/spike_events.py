"""Detection of spikes in losses and in the RMS of updates. `spikes.py` uses it.

The rules are modelled on those of Wortsman et al. 2023 (arXiv 2304.13013, its appendix on loss spikes). The windows are ours.

    RMS spike    RMS >= 2.3
    loss spike   loss > mean + 3.2 * standard deviation of the 50 losses before it, at two steps or more of the event
    an event     steps less than 10 apart; it begins at the first of them
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["FOLLOWS", "RMS_THRESHOLD", "WINDOW", "events", "lags", "loss_spikes", "rises", "rms_spikes"]

RMS_THRESHOLD = 2.3
DEVIATIONS = 3.2
WINDOW = 50  # steps of the running mean and deviation
APART = 10  # steps; closer ones are one event
LEAST_STEPS = 2  # above the threshold in a loss spike: one step may be an odd batch
FOLLOWS = range(1, 9)  # lags in steps at which the paper says that a loss spike follows an RMS spike


def events(steps: Sequence[int], least_steps: int = 1) -> list[int]:
    """Merge ascending steps less than `APART` apart; return the first of each event with `least_steps` or more."""
    merged: list[list[int]] = []
    for step in steps:
        if merged and step - merged[-1][-1] < APART:
            merged[-1].append(step)
        else:
            merged.append([step])
    return [event[0] for event in merged if len(event) >= least_steps]


def rms_spikes(rms: Sequence[float], start: int) -> list[int]:
    """Return the steps, from `start` on, at which RMS spikes begin."""
    return events([step for step in range(start, len(rms)) if rms[step] >= RMS_THRESHOLD])


def loss_spikes(losses: Sequence[float], start: int) -> list[int]:
    """Return the steps, from `start` >= `WINDOW` on, at which loss spikes begin."""
    high = []
    for step in range(start, len(losses)):
        before = losses[step - WINDOW : step]
        if not losses[step] <= np.mean(before) + DEVIATIONS * np.std(before):  # also where it is NaN
            high.append(step)
    return events(high, LEAST_STEPS)


def rises(losses: Sequence[float], start: int) -> list[float]:
    """Return how far each loss from `start` >= `WINDOW` on is above the mean of the `WINDOW` before it."""
    return [losses[step] - float(np.mean(losses[step - WINDOW : step])) for step in range(start, len(losses))]


def lags(loss_events: Sequence[int], rms_events: Sequence[int]) -> list[int | None]:
    """Return for each loss spike the steps since the last RMS spike began, 0 if at the same step, None if there was none before."""
    return [min((step - before for before in rms_events if before <= step), default=None) for step in loss_events]
