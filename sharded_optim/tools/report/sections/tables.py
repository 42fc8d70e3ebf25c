"""Tables that show several runs side by side: the overview, the config and the environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sharded_optim.tools.report.charts import Item, Note, Table
from sharded_optim.tools.report.sections.series import count, losses, number, with_unit
from sharded_optim.tools.report.sections.spikes import largest_rms
from sharded_optim.tools.runs import Run
from sharded_optim.trackers.dotted_keys import dotted_keys

__all__ = ["config", "environment", "overview"]


def overview(runs: Mapping[str, Run]) -> list[Item]:
    """Return a table of each run's state at its last record, and notes on resumed runs and unreadable lines."""
    rows = {
        "status": [run.status for run in runs.values()],
        "steps done": [count(run.records.last_step) + (f" of {count(run.steps)}" if run.steps else "") for run in runs.values()],
        "training loss": [with_unit(_last_loss(run), run.records.loss_unit) for run in runs.values()],
        "validation loss": [with_unit(_last_validation(run), run.records.loss_unit) for run in runs.values()],
        "largest RMS": [_largest(run) for run in runs.values()],
        "skipped steps": [count(run.records.training[-1].skipped_steps) for run in runs.values()],
        "tokens/s": [count(run.summary.get("tokens_per_second")) for run in runs.values()],
        "seconds since the last start": [count(run.summary.get("seconds")) for run in runs.values()],
        "parameters": [count(run.summary.get("parameters")) for run in runs.values()],
    }
    shown = _with_values([[key, *row] for key, row in rows.items()])
    items: list[Item] = [Table(caption="Each run at its last record", headings=["value", *runs], rows=shown)]
    for label, run in runs.items():
        if run.records.restarts:
            steps = ", ".join(map(count, run.records.restarts))
            items.append(Note(f"{label} was resumed; the records before were dropped from step {steps} on."))
        if run.records.unreadable:
            items.append(Note(f"{label}: {count(run.records.unreadable)} lines of metrics.jsonl are no records and were left out."))
    return items


def config(runs: Mapping[str, Run]) -> list[Item]:
    """Return a table of the configs, with the keys that differ between runs marked."""
    items: list[Item] = [Note(f"{label} has no config that can be read.") for label, run in runs.items() if not run.config]
    flat = [dotted_keys(run.config) for run in runs.values()]
    # Null is the default of a key that was not given: a row of nulls says nothing.
    keys = dict.fromkeys(key for each in flat for key in each if any(other.get(key) is not None for other in flat))
    if not keys:
        return items
    rows = [[key, *(_cell(each, key) for each in flat)] for key in keys]
    marked = _differing(rows)
    caption = "Keys of the config that are not null" + ("; bold rows differ between the runs" if marked else "")
    return [*items, Table(caption=caption, headings=["key", *runs], rows=rows, marked=marked)]


def environment(runs: Mapping[str, Run]) -> list[Item]:
    """Return a table of machine and libraries, with the values that differ between runs marked."""
    items: list[Item] = [Note(f"{label} has no summary.json that can be read.") for label, run in runs.items() if not run.summary]
    names = ("torch", "device", "world_size", "sharding", "optimizer", "text")
    rows = _with_values([[name, *(_cell(run.summary, name) for run in runs.values())] for name in names])
    rows = [["folder", *(str(run.path) for run in runs.values())], *rows]
    marked = [index for index in _differing(rows) if index]  # folders always differ
    return [*items, Table(caption="Where the runs ran", headings=["value", *runs], rows=rows, marked=marked)]


def _last_loss(run: Run) -> float | None:
    _, values = losses(run)
    return values[-1] if values else None


def _last_validation(run: Run) -> float | None:
    return run.records.validation[-1].loss if run.records.validation else None


def _largest(run: Run) -> str:
    found = [(value, name, record.step) for record in run.records.training for name, value in [largest_rms(record)] if name is not None]
    if not found:
        return "-"
    value, name, step = max(found)
    return f"{number(value)} at step {count(step)}, {name}"


def _cell(values: Mapping[str, Any], key: str) -> str:
    """Format a value; null is the default of a key that was not given."""
    return "-" if key not in values else "default" if values[key] is None else str(values[key])


def _with_values(rows: list[list[str]]) -> list[list[str]]:
    """Leave out the rows for which no run has a value."""
    return [row for row in rows if any(cell != "-" for cell in row[1:])]


def _differing(rows: list[list[str]]) -> list[int]:
    return [index for index, row in enumerate(rows) if len(set(row[1:])) > 1]
