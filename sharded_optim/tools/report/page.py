"""Make the HTML page of a report from its sections. Style, script and drawings are inside, and nothing is fetched.

`page.html.jinja` is the page, with all text escaped; `page.css` its style; `page.js` shows values under a pointer or a slider. Without
the script the page has all but that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from sharded_optim.tools.report.charts import Chart, HeatMap, LineChart, Note, Section, StackChart, Table
from sharded_optim.tools.report.drawing import NARROW, WIDE, Drawing, draw_svg
from sharded_optim.tools.report.palette import DARK, LIGHT
from sharded_optim.tools.runs import printable
from sharded_optim.version import __version__

__all__ = ["page_of"]

MOST_STEPS = 2000  # whose values are in the page
MOST_TABLE_ROWS = 100  # of the table behind a chart

FILES = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart as the template shows it."""

    key: str
    title: str
    explanation: str
    text: str  # what a reader hears in place of the drawing
    wide: Drawing
    narrow: Drawing
    data: dict[str, Any]  # what page.js reads
    table: Table
    kind = "figure"


def page_of(sections: Sequence[Section], labels: Sequence[str], *, refresh: int | None) -> str:
    """Return the page.

    Args:
        labels: of the runs.
        refresh: seconds after which a browser loads the page again; None is never.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FILES),
        autoescape=True,
        finalize=_printable,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    count = 0
    shown = []
    for section in sections:
        items = []
        for item in section.items:
            if isinstance(item, Table):
                items.append({"kind": "table", "table": item})
            elif isinstance(item, Note):
                items.append({"kind": "note", "text": item.text})
            else:
                count += 1
                items.append(_figure(item, f"f{count}"))
        shown.append({"key": section.key, "title": section.title, "items": items})
    return environment.get_template("page.html.jinja").render(
        title=f"Training report: {', '.join(labels)}",
        sections=shown,
        refresh=refresh,
        written=f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        version=__version__,
        variables={"light": _variables(LIGHT), "dark": _variables(DARK)},
        style=Markup((FILES / "page.css").read_text(encoding="utf-8")),
        script=Markup((FILES / "page.js").read_text(encoding="utf-8")),
    )


def _printable(value: Any) -> Any:
    """Clean text, but not what is HTML already."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _variables(colors: dict[str, str]) -> Markup:
    return Markup(" ".join(f"--{name}: {value};" for name, value in colors.items()))


def _figure(chart: Chart, key: str) -> Figure:
    data, table = (_heat_map_data(chart), chart.summary) if isinstance(chart, HeatMap) else _line_data(chart)
    return Figure(
        key=key,
        title=chart.title,
        explanation=chart.explanation,
        text=_described(chart),
        wide=draw_svg(chart, WIDE, f"{key}w-"),
        narrow=draw_svg(chart, NARROW, f"{key}n-"),
        data=data,
        table=table,
    )


def _line_data(chart: LineChart | StackChart) -> tuple[dict[str, Any], Table]:
    """Return what page.js reads, and the table of the same values: of all steps, or of as many as fit, evenly chosen and with the last."""
    if isinstance(chart, StackChart):
        named = [(name, chart.steps, values) for name, values in chart.parts]
    else:
        named = [(each.name, each.steps, each.values) for each in chart.series]
    columns = [(name, dict(zip(steps, values, strict=True))) for name, steps, values in named]
    all_steps = sorted({step for _, column in columns for step in column})
    steps = _chosen(all_steps, MOST_STEPS)
    series = [{"name": name, "values": [_json_value(column, step) for step in steps]} for name, column in columns]
    listed = _chosen(all_steps, MOST_TABLE_ROWS)
    caption = f"{chart.title}, {chart.unit}"
    if len(listed) < len(all_steps):
        caption += f"; {len(listed)} of {len(all_steps):,} steps, metrics.jsonl has all"
    rows = [[f"{step:,}", *(_cell(column, step) for _, column in columns)] for step in listed]
    return {"steps": steps, "series": series}, Table(caption=caption, headings=["step", *(name for name, _ in columns)], rows=rows)


def _heat_map_data(chart: HeatMap) -> dict[str, Any]:
    # Six digits are more than a color shows, and a third of the page's size less than all.
    values = [[float(f"{value:.6g}") if math.isfinite(value) else None for value in row] for row in chart.values.tolist()]
    series = [{"name": name, "values": row} for name, row in zip(chart.rows, values, strict=True)]
    return {"steps": list(chart.steps), "series": series, "rows": True}


def _chosen(steps: Sequence[int], most: int) -> list[int]:
    """Return at most that many, evenly chosen, with the last."""
    every = -(-len(steps) // most)
    return list(reversed(steps[::-1][::every]))


def _json_value(column: dict[int, float], step: int) -> float | str | None:
    """Return a value as JSON has it: null where there is none, a word where it is not finite."""
    if step not in column:
        return None
    return column[step] if math.isfinite(column[step]) else "not finite"


def _cell(column: dict[int, float], step: int) -> str:
    value = _json_value(column, step)
    return "" if value is None else value if isinstance(value, str) else f"{value:.6g}"


def _described(chart: Chart) -> str:
    """Return a text in place of the drawing: what it shows, and where each curve begins and ends."""
    match chart:
        case HeatMap():
            finite = [value for value in chart.values.ravel().tolist() if math.isfinite(value)]
            span = f"between {min(finite):.4g} and {max(finite):.4g}" if finite else "nowhere finite"
            count = len(chart.spikes)
            return (
                f"Heat map of {len(chart.rows)} tensors over steps {chart.steps[0]:,} to {chart.steps[-1]:,}; values are {span}; "
                f"{count} {'step is' if count == 1 else 'steps are'} marked as spikes."
            )
        case StackChart():
            ends = _ends((name, chart.steps, values) for name, values in chart.parts)
            return f"Stacked areas over steps {chart.steps[0]:,} to {chart.steps[-1]:,}, in {chart.unit}. {ends}"
        case LineChart():
            return f"Lines over steps, in {chart.unit}. {_ends((each.name, each.steps, each.values) for each in chart.series)}"


def _ends(series: Iterable[tuple[str, Sequence[int], Sequence[float]]]) -> str:
    parts = []
    for name, steps, values in series:
        finite = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        if finite:
            (first, begin), (last, end) = finite[0], finite[-1]
            parts.append(f"{name}: {begin:.4g} at step {first:,}, {end:.4g} at step {last:,}.")
        else:
            parts.append(f"{name}: no finite value.")
    return " ".join(parts)
