"""The configs of the runs, with what differs."""

from __future__ import annotations

from collections.abc import Sequence

from sharded_optim.tools.report.charts import Item, Note, Table
from sharded_optim.tools.report.sections.series import cell, pairs
from sharded_optim.tools.runs import Run
from sharded_optim.trackers.dotted_keys import dotted_keys

__all__ = ["KEY", "TITLE", "build"]

KEY, TITLE = "config", "Config"


def build(runs: Sequence[Run], labels: Sequence[str]) -> list[Item]:
    items: list[Item] = [Note(f"{label} has no config that can be read.") for run, label in pairs(runs, labels) if not run.config]
    flat = [dotted_keys(run.config) for run in runs]
    keys = list(dict.fromkeys(key for each in flat for key in each))
    # Null is the default of a key that was not given: a row of nulls says nothing.
    keys = [key for key in keys if any(each.get(key) is not None for each in flat)]
    if not keys:
        return items
    rows = [[key, *(cell(each[key]) if key in each else "-" for each in flat)] for key in keys]
    marked = [index for index, row in enumerate(rows) if len(set(row[1:])) > 1]
    caption = "Keys of the config that are not null" + ("; bold rows differ between the runs" if marked else "")
    return [*items, Table(caption=caption, headings=["key", *labels], rows=rows, marked=marked)]
