"""Make the HTML page of a report from its sections. Style, script and drawings are inside, and nothing is fetched.

`page.html.jinja` is the page, with all text escaped; `page.css` its style; `page.js` shows values under a pointer or a slider, which is
all that is missing without scripts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from sharded_optim.tools.report.charts import Chart, HeatMap, Item, LineChart, Note, Section, Table
from sharded_optim.tools.report.drawing import NARROW, WIDE, draw_svg
from sharded_optim.tools.report.palette import DARK, LIGHT
from sharded_optim.tools.runs import printable
from sharded_optim.version import __version__

__all__ = ["page_of"]

MOST_STEPS = 2000  # steps of a chart whose values are in the page
MOST_TABLE_ROWS = 100  # rows of the table behind a chart

FILES = Path(__file__).parent


def page_of(sections: Sequence[Section], labels: Sequence[str], *, refresh: int | None) -> str:
    """Return the page as HTML.

    Args:
        labels: the names of the runs.
        refresh: seconds after which a browser loads the page again; None: never.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FILES),
        autoescape=True,
        finalize=_printable,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    keys = (f"f{number}" for number in count(1))
    shown = [{"key": section.key, "title": section.title, "items": [_shown(item, keys) for item in section.items]} for section in sections]
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
    """Replace unprintable characters of text; anything else, also HTML, is returned as it is."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _variables(colors: dict[str, str]) -> Markup:
    return Markup(" ".join(f"--{name}: {value};" for name, value in colors.items()))


def _shown(item: Item, keys: Iterator[str]) -> dict[str, Any]:
    """Convert an item to the values that the template shows.

    Args:
        keys: unique keys for figures.
    """
    if isinstance(item, Note):
        return {"kind": "note", "text": item.text}
    if isinstance(item, Table):
        return {"kind": "table", "table": item}
    key = next(keys)
    data, table = (_heat_map_data(item), item.summary) if isinstance(item, HeatMap) else _line_data(item)
    return {
        "kind": "figure",
        "key": key,
        "title": item.title,
        "explanation": item.explanation,
        "text": _described(item),  # what a screen reader says in place of the drawing
        "wide": draw_svg(item, WIDE, f"{key}w-"),
        "narrow": draw_svg(item, NARROW, f"{key}n-"),
        "data": data,  # what page.js reads
        "table": table,
    }


def _line_data(chart: LineChart) -> tuple[dict[str, Any], Table]:
    """Return the data that page.js reads, and the table of the same values. Too many steps are thinned evenly; the last step stays."""
    columns = [(each.name, dict(zip(each.steps, each.values, strict=True))) for each in chart.series]
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
    # Six digits are more than a color shows, and make the page a third smaller than all digits.
    values = [[float(f"{value:.6g}") if math.isfinite(value) else None for value in row] for row in chart.values.tolist()]
    series = [{"name": name, "values": row} for name, row in zip(chart.rows, values, strict=True)]
    return {"steps": list(chart.steps), "series": series, "rows": True}


def _chosen(steps: Sequence[int], most: int) -> list[int]:
    """Return at most `most` of the steps, evenly chosen, with the last one."""
    every = -(-len(steps) // most)
    return list(reversed(steps[::-1][::every]))


def _json_value(column: dict[int, float], step: int) -> float | str | None:
    """Return the value at a step, for JSON: None if there is none, and text if it is not finite."""
    if step not in column:
        return None
    return column[step] if math.isfinite(column[step]) else "not finite"


def _cell(column: dict[int, float], step: int) -> str:
    value = _json_value(column, step)
    return "" if value is None else value if isinstance(value, str) else f"{value:.6g}"


def _described(chart: Chart) -> str:
    """Describe a chart in words, for screen readers: its content, and the first and last value of each curve."""
    if isinstance(chart, HeatMap):
        finite = chart.values[np.isfinite(chart.values)]
        span = f"between {finite.min():.4g} and {finite.max():.4g}" if finite.size else "nowhere finite"
        spikes = len(chart.spikes)
        return (
            f"Heat map of {len(chart.rows)} tensors over steps {chart.steps[0]:,} to {chart.steps[-1]:,}; values are {span}; "
            f"{spikes} {'step is' if spikes == 1 else 'steps are'} marked as spikes."
        )
    steps = chart.series[0].steps
    parts = [f"Stacked areas over steps {steps[0]:,} to {steps[-1]:,}" if chart.stacked else "Lines over steps"]
    parts[0] += f", in {chart.unit}."
    for each in chart.series:
        finite = [(step, value) for step, value in zip(each.steps, each.values, strict=True) if math.isfinite(value)]
        if finite:
            (first, begin), (last, end) = finite[0], finite[-1]
            parts.append(f"{each.name}: {begin:.4g} at step {first:,}, {end:.4g} at step {last:,}.")
        else:
            parts.append(f"{each.name}: no finite value.")
    return " ".join(parts)
