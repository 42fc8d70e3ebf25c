"""Spikes among the records of a run, by the rules of `sharded_optim.tools.spikes`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sharded_optim.tools import spikes
from sharded_optim.tools.runs import TrainingRecord

__all__ = ["RUNNING_LOSSES", "largest_rms", "loss_spikes", "rms_spikes"]

# Number of records before a spike that give mean and deviation; with more, the loss's own decrease would dominate. One high record is
# enough for a spike: in the training job it is the mean of several steps.
RUNNING_LOSSES = 20


def rms_spikes(records: Sequence[TrainingRecord]) -> list[tuple[int, str, float]]:
    """Return (step, tensor, RMS) of the records at which RMS spikes begin."""
    largest = list(map(largest_rms, records))
    found = spikes.rms_spikes([value for _, value in largest])
    return [(records[index].step, largest[index][0] or "", largest[index][1]) for index in found]


def loss_spikes(records: Sequence[TrainingRecord]) -> list[tuple[int, float]]:
    """Return (step, loss) of the records at which loss spikes begin."""
    losses = [(record.step, record.loss) for record in records if record.loss is not None]
    return [losses[index] for index in spikes.loss_spikes([loss for _, loss in losses], window=RUNNING_LOSSES)]


def largest_rms(record: TrainingRecord) -> tuple[str | None, float]:
    """Return (name, RMS) of the tensor with the largest finite RMS in a record; (None, NaN) if there is none."""
    finite = {name: value for name, value in record.by_name("rms").items() if math.isfinite(value)}
    if finite:
        name = max(finite, key=finite.__getitem__)
        return name, finite[name]
    if record.largest_rms is not None and math.isfinite(record.largest_rms):
        return record.largest_rms_name, record.largest_rms
    return None, math.nan
