"""Find spikes in losses and in the RMS of updates. Used by `sharded_optim.tools.report` and by the experiments of the repository.

The rules are modelled on those of Wortsman et al., "Stable and low-precision training for large-scale vision-language models" (2023,
arXiv 2304.13013), appendix D. The paper gives no window for mean and deviation, so callers choose one.

    RMS spike    RMS >= 2.3
    loss spike   loss > mean + 3.2 * standard deviation of the losses before it, in a window
    an event     spikes less than 10 apart; it begins at the first of them

Distances and windows are counted in records, which are steps if every step has a record.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["LOSS_DEVIATIONS", "RMS_THRESHOLD", "events", "loss_spikes", "rms_spikes"]

RMS_THRESHOLD = 2.3
LOSS_DEVIATIONS = 3.2
APART = 10
LEAST_BEFORE = 10  # losses that must precede a spike: the mean and deviation of fewer say little


def events(indices: Sequence[int], least: int = 1) -> list[int]:
    """Merge ascending indices that are less than `APART` apart into events; return the first index of each with at least `least`."""
    merged: list[list[int]] = []
    for index in indices:
        if merged and index - merged[-1][-1] < APART:
            merged[-1].append(index)
        else:
            merged.append([index])
    return [event[0] for event in merged if len(event) >= least]


def rms_spikes(rms: Sequence[float], start: int = 0) -> list[int]:
    """Return the indices, from `start` on, at which RMS spikes begin. NaN is no spike: it comes from a non-finite gradient."""
    return events([index for index in range(start, len(rms)) if rms[index] >= RMS_THRESHOLD])


def loss_spikes(losses: Sequence[float], *, window: int, start: int = 0, least: int = 1) -> list[int]:
    """Return the indices, from `start` on, at which loss spikes begin. A loss of NaN or infinity is a spike.

    Args:
        window: the number of preceding losses; mean and deviation are those of the finite ones.
        least: the number of spikes that an event needs. The paper asks for several: one step may be an odd batch.
    """
    high = []
    for index in range(start, len(losses)):
        before = [each for each in losses[max(0, index - window) : index] if math.isfinite(each)]
        if len(before) >= LEAST_BEFORE and not losses[index] <= np.mean(before) + LOSS_DEVIATIONS * np.std(before):
            high.append(index)
    return events(high, least)
