"""Make charts, tables, notes and formatted numbers that several sections use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sharded_optim.tools.report.charts import Item, LineChart, Note, Series, Table
from sharded_optim.tools.report.palette import SERIES
from sharded_optim.tools.runs import Run, TrainingRecord

__all__ = ["count", "first_rows", "left_out", "line_chart", "losses", "number", "over_steps", "titled", "with_unit"]

MOST_LISTED = 20  # most rows in a table of tensors or events


def line_chart(
    runs: Mapping[str, Run],
    key: str,
    title: str,
    explanation: str,
    *,
    unit: str,
    absent: str,
    values_of: Callable[[TrainingRecord], Mapping[str, float]] | None = None,
    log: bool = False,
    **chart: Any,
) -> list[Item]:
    """Return a chart of one or several values of all records, and a note that names the runs without them.

    Args:
        key: the key of the chart, and of the optimizer's metric that it shows.
        absent: the text of the note, with {label} in the place of the runs' names.
        values_of: returns the values of a record by name, instead of that metric; the empty name stands for the run itself.
        log: whether the y axis is logarithmic, if all values are positive, instead of beginning at 0.
        chart: further fields of the LineChart.
    """

    def metric(record: TrainingRecord) -> Mapping[str, float]:
        return {"": record.optimizer[key]} if key in record.optimizer else {}

    series: list[Series] = []
    without: list[str] = []
    for index, (label, run) in enumerate(runs.items()):
        found = over_steps(run, values_of or metric)
        if not found:
            without.append(label)
        for place, (name, (steps, values)) in enumerate(found.items()):
            full = ", ".join(part for part in (label if len(runs) > 1 or not name else "", name) if part)
            color = index if len(runs) > 1 else place
            series.append(Series(name=full, steps=steps, values=values, color=color, dash=place + index // SERIES))
    items: list[Item] = []
    if series:
        chart = {"from_zero": not log, **chart}
        items.append(LineChart(key=key, title=title, explanation=explanation, unit=unit, series=series, log=log, **chart))
    return items + left_out(absent, without)


def left_out(reason: str, labels: Sequence[str]) -> list[Item]:
    """Return one note for all runs that a chart leaves out; {label} in the reason is replaced by their names."""
    return [Note(reason.replace("{label}", ", ".join(labels)))] if labels else []


def over_steps(run: Run, values_of: Callable[[TrainingRecord], Mapping[str, float]]) -> dict[str, tuple[list[int], list[float]]]:
    """Return (steps, values) over all records, by the name of the value."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for record in run.records.training:
        for name, value in values_of(record).items():
            steps, values = found.setdefault(name, ([], []))
            steps.append(record.step)
            values.append(value)
    return found


def losses(run: Run) -> tuple[list[int], list[float]]:
    """Return steps and training losses of the records that have a loss."""
    return over_steps(run, lambda record: {} if record.loss is None else {"": record.loss}).get("", ([], []))


def titled(title: str, label: str, runs: Mapping[str, Run]) -> str:
    """Add the run's label to a title if there are several runs."""
    return f"{title}, {label}" if len(runs) > 1 else title


def number(value: float | None) -> str:
    """Format a number with four significant digits, and None as a dash.

    >>> number(2.0456), number(0.0004), number(float("nan")), number(None)
    ('2.046', '0.0004', 'not finite', '-')
    """
    return "-" if value is None else f"{value:.4g}" if math.isfinite(value) else "not finite"


def with_unit(value: float | None, unit: str) -> str:
    """Format a value with its unit, if there is one.

    >>> with_unit(2.0, "bits per byte"), with_unit(2.0, ""), with_unit(None, "GB")
    ('2 bits per byte', '2', '-')
    """
    return f"{number(value)} {unit}" if unit and value is not None else number(value)


def count(value: Any) -> str:
    """Format a number as an integer with separators, and anything else as a dash."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return f"{value:,.0f}" if is_number else "-"


def first_rows(caption: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table of the first rows; if rows are left out, the caption says how many there are."""
    more = f"; the first {MOST_LISTED} of {len(rows):,}" if len(rows) > MOST_LISTED else ""
    return Table(caption=caption + more, headings=headings, rows=rows[:MOST_LISTED])
