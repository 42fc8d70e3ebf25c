"""RMS of updates: a chart of the largest RMS, a heat map of all tensors, and tables of spikes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from sharded_optim.tools.report.charts import HeatMap, Item, Series, Table
from sharded_optim.tools.report.sections.series import count, first_rows, left_out, line_chart, losses, number, titled, with_unit
from sharded_optim.tools.report.sections.spikes import largest_rms, loss_spikes, rms_spikes
from sharded_optim.tools.runs import Run, TrainingRecord
from sharded_optim.tools.spikes import LOSS_DEVIATIONS, RMS_THRESHOLD

__all__ = ["build"]

MOST_COLUMNS = 1200  # columns of a heat map, about as many as a page is wide in pixels
MOST_ROWS = 120  # rows of a heat map


def build(runs: Mapping[str, Run]) -> list[Item]:
    items = line_chart(
        runs,
        "largest_rms",
        "Largest RMS of any tensor",
        "The root mean of g²/max(v, eps²) over a tensor. Large: the second moment lags behind the gradient.",
        unit="RMS",
        absent="RMS of {label}: left out, as no record has one; optimizers without update clipping report none.",
        values_of=lambda record: {"": largest_rms(record)[1]} if _has_rms(record) else {},
        levels=[("update clipping begins", 1.0), ("spike", RMS_THRESHOLD)],
        from_zero=False,
    )
    only_largest = []
    for label, run in runs.items():
        if any(record.by_name("rms") for record in run.records.training):
            items.append(_heat_map(run, label, runs))
        elif any(map(_has_rms, run.records.training)):
            only_largest.append(label)
    items += left_out("RMS of each tensor of {label}: left out, as records have the largest RMS alone, and no rms/NAME.", only_largest)
    return items + [table for label, run in runs.items() for table in _spike_tables(run, label)]


def _has_rms(record: TrainingRecord) -> bool:
    return record.largest_rms is not None or any(key.startswith("rms/") for key in record.optimizer)


def _heat_map(run: Run, label: str, runs: Mapping[str, Run]) -> HeatMap:
    by_step = {record.step: values for record in run.records.training if (values := record.by_name("rms"))}
    names = list(dict.fromkeys(name for values in by_step.values() for name in values))
    table = np.array([[values.get(name, np.nan) for values in by_step.values()] for name in names])
    table[np.isinf(table)] = np.nan
    largest = np.fmax.reduce(table, axis=1)
    kept = np.arange(len(names))
    explanation = "Rows are tensors in the order of the model. "
    if len(names) > MOST_ROWS:
        kept = np.sort(np.argsort(-np.nan_to_num(largest, nan=-1.0), kind="stable")[:MOST_ROWS])
        explanation += f"Of {len(names):,} tensors those {MOST_ROWS} with the largest RMS. "
    steps, columns = _in_columns(list(by_step), table[kept])
    if len(steps) < len(by_step):
        explanation += "Each column is the largest of several records. "
    loss_steps, loss_values = losses(run)
    return HeatMap(
        key=f"rms_{label}",
        title=titled("RMS of each tensor", label, runs),
        explanation=explanation + f"Triangles in the loss above mark steps in which a tensor has an RMS of {RMS_THRESHOLD} or more.",
        unit="RMS",
        steps=steps,
        rows=[names[index] for index in kept],
        values=columns,
        loss=Series(name="training loss", steps=loss_steps, values=loss_values, color=0),
        spikes=[step for step, _, _ in rms_spikes(run.records.training)],
        spikes_name="RMS spikes",
        summary=Table(
            caption="RMS of each tensor over all records",
            headings=["row", "tensor", "largest", "at step", "median", "last"],
            rows=[[str(row + 1), names[index], *_summary(list(by_step), table[index])] for row, index in enumerate(kept)],
        ),
    )


def _summary(steps: Sequence[int], values: np.ndarray) -> list[str]:
    """Return the largest value, its step, the median and the last value; values that are not finite are left out."""
    if np.isnan(values).all():
        return ["-"] * 4
    largest = int(np.nanargmax(values))
    return [
        number(values[largest]),
        count(steps[largest]),
        number(np.nanmedian(values)),
        "-" if np.isnan(values[-1]) else number(values[-1]),
    ]


def _in_columns(steps: Sequence[int], table: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Resample records to columns of equal distance. A column has the largest values of its records; without records it copies the next.

    Args:
        steps: (records,), rising.
        table: (rows, records).
    """
    if len(steps) == 1:
        return list(steps), table
    least = min(later - earlier for earlier, later in pairwise(steps))
    apart = max(least, math.ceil((steps[-1] - steps[0]) / (MOST_COLUMNS - 1)))
    places = [math.ceil((step - steps[0]) / apart) for step in steps]
    found = np.full((table.shape[0], places[-1] + 1), np.nan)
    for column, place in enumerate(places):
        found[:, place] = np.fmax(found[:, place], table[:, column])
    filled = set(places)
    for place in range(places[-1], -1, -1):
        if place not in filled:
            found[:, place] = found[:, place + 1]
    return [steps[0] + apart * place for place in range(places[-1] + 1)], found


def _spike_tables(run: Run, label: str) -> list[Table]:
    records = run.records.training
    events = [(step, "RMS", f"{number(value)} of {name}") for step, name, value in rms_spikes(records)]
    events += [(step, "loss", with_unit(value, run.records.loss_unit)) for step, value in loss_spikes(records)]
    rule = f"RMS of {RMS_THRESHOLD} or more; loss more than {LOSS_DEVIATIONS} running deviations above its running mean"
    rows = [[count(step), kind, value] for step, kind, value in sorted(events)]
    return [first_rows(f"Spikes of {label}: {rule}", ["step", "of", "value"], rows)] if rows else []
