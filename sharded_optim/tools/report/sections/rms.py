"""RMS of updates: the largest, a heat map of each tensor, and spikes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from sharded_optim.tools.report.charts import HeatMap, Item, LineChart, Series, Table
from sharded_optim.tools.report.palette import SERIES
from sharded_optim.tools.report.sections.series import MOST_LISTED, count, left_out, losses, number, pairs, titled, with_unit
from sharded_optim.tools.report.sections.spikes import largest_rms, loss_spikes, rms_spikes
from sharded_optim.tools.runs import Run, TrainingRecord
from sharded_optim.tools.spikes import LOSS_DEVIATIONS, RMS_THRESHOLD

__all__ = ["KEY", "TITLE", "build"]

KEY, TITLE = "rms", "Update RMS"
MOST_COLUMNS = 1200  # of a heat map, about the pixels of a page's width
MOST_ROWS = 120  # of a heat map
ROW_HEADINGS = ("row", "tensor", "largest", "at step", "median", "last")


def build(runs: Sequence[Run], labels: Sequence[str]) -> list[Item]:
    items: list[Item] = []
    series: list[Series] = []
    without: list[str] = []
    for index, (run, label) in enumerate(pairs(runs, labels)):
        points = [(record.step, largest_rms(record)[1]) for record in run.records.training if _has_rms(record)]
        if points:
            steps, values = zip(*points, strict=True)
            series.append(Series(name=label, steps=steps, values=values, color=index, dash=index // SERIES))
        else:
            without.append(label)
    if series:
        chart = LineChart(
            key="largest_rms",
            title="Largest RMS of any tensor",
            explanation="The root mean of g²/max(v, eps²) over a tensor. Large: the second moment lags behind the gradient.",
            unit="RMS",
            series=series,
            levels=[("update clipping begins", 1.0), ("spike", RMS_THRESHOLD)],
        )
        items.append(chart)
    items += left_out("RMS of {label}: left out, as no record has one; optimizers without update clipping report none.", without)
    only_largest = []
    for run, label in pairs(runs, labels):
        if any(record.by_name("rms") for record in run.records.training):
            items.append(_heat_map(run, label, len(runs) > 1))
        elif label not in without:
            only_largest.append(label)
    items += left_out("RMS of each tensor of {label}: left out, as records have the largest RMS alone, and no rms/NAME.", only_largest)
    items += [table for run, label in pairs(runs, labels) if (table := _spike_table(run, label)) is not None]
    return items


def _has_rms(record: TrainingRecord) -> bool:
    return record.largest_rms is not None or any(key.startswith("rms/") for key in record.optimizer)


def _heat_map(run: Run, label: str, several: bool) -> HeatMap:
    records = [record for record in run.records.training if record.by_name("rms")]
    by_step = {record.step: record.by_name("rms") for record in records}
    names = list(dict.fromkeys(name for values in by_step.values() for name in values))
    table = np.full((len(names), len(records)), np.nan)
    place = {name: row for row, name in enumerate(names)}
    for column, values in enumerate(by_step.values()):
        for name, value in values.items():
            table[place[name], column] = value if math.isfinite(value) else np.nan
    largest = np.fmax.reduce(table, axis=1)
    kept = np.arange(len(names))
    explanation = "Rows are tensors in the order of the model. "
    if len(names) > MOST_ROWS:
        kept = np.sort(np.argsort(-np.nan_to_num(largest, nan=-1.0), kind="stable")[:MOST_ROWS])
        explanation += f"Of {len(names):,} tensors those {MOST_ROWS} with the largest RMS. "
    steps, columns = _in_columns(list(by_step), table[kept])
    if len(steps) < len(records):
        explanation += "Each column is the largest of several records. "
    spikes = rms_spikes(run.records.training)
    loss_steps, loss_values = losses(run)
    rows = []
    for row, index in enumerate(kept):
        values = table[index]
        finite = values[np.isfinite(values)]
        if not len(finite):
            rows.append([str(row + 1), names[index], "-", "-", "-", "-"])
            continue
        step = list(by_step)[int(np.nanargmax(values))]
        last = number(values[-1]) if math.isfinite(values[-1]) else "-"
        rows.append([str(row + 1), names[index], number(finite.max()), count(step), number(float(np.median(finite))), last])
    return HeatMap(
        key=f"rms_{label}",
        title=titled("RMS of each tensor", label, several),
        explanation=explanation + f"Triangles in the loss above mark steps in which a tensor has an RMS of {RMS_THRESHOLD} or more.",
        unit="RMS",
        steps=steps,
        rows=[names[index] for index in kept],
        values=columns,
        loss=Series(name="training loss", steps=loss_steps, values=loss_values, color=0),
        spikes=[step for step, _, _ in spikes],
        spikes_name="RMS spikes",
        summary=Table(caption="RMS of each tensor over all records", headings=ROW_HEADINGS, rows=rows),
    )


def _in_columns(steps: Sequence[int], table: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Put records in columns that are equally far apart: the largest of those in a column, and the next record where there is none.

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


def _spike_table(run: Run, label: str) -> Table | None:
    records = run.records.training
    events = [(step, "RMS", f"{number(value)} of {name}") for step, name, value in rms_spikes(records)]
    events += [(step, "loss", with_unit(value, run.records.loss_unit)) for step, value in loss_spikes(records)]
    if not events:
        return None
    events.sort()
    more = f"; the first {MOST_LISTED} of {len(events):,}" if len(events) > MOST_LISTED else ""
    rule = f"RMS of {RMS_THRESHOLD} or more; loss more than {LOSS_DEVIATIONS} running deviations above its running mean"
    caption = f"Spikes of {label}: {rule}{more}"
    return Table(
        caption=caption, headings=["step", "of", "value"], rows=[[count(step), kind, value] for step, kind, value in events[:MOST_LISTED]]
    )
