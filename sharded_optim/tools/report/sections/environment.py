"""Where the runs ran."""

from __future__ import annotations

from collections.abc import Sequence

from sharded_optim.tools.report.charts import Item, Note, Table
from sharded_optim.tools.report.sections.series import cell, pairs, with_values
from sharded_optim.tools.runs import Run

__all__ = ["KEY", "TITLE", "build"]

KEY, TITLE = "environment", "Environment"


def build(runs: Sequence[Run], labels: Sequence[str]) -> list[Item]:
    items: list[Item] = [Note(f"{label} has no summary.json that can be read.") for run, label in pairs(runs, labels) if not run.summary]
    names = ("torch", "device", "world_size", "sharding", "optimizer", "text")
    rows = [["folder", *(str(run.path) for run in runs)]]
    rows += [[name, *(cell(run.summary[name]) if name in run.summary else "-" for run in runs)] for name in names]
    rows = with_values(rows)
    marked = [index for index, row in enumerate(rows) if index and len(set(row[1:])) > 1]
    return [*items, Table(caption="Where the runs ran", headings=["value", *labels], rows=rows, marked=marked)]
