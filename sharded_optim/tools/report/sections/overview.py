"""Each run at its last record."""

from __future__ import annotations

from collections.abc import Sequence

from sharded_optim.tools.report.charts import Item, Note, Table
from sharded_optim.tools.report.sections.series import count, losses, number, pairs, with_unit, with_values
from sharded_optim.tools.report.sections.spikes import largest_rms
from sharded_optim.tools.runs import Run

__all__ = ["KEY", "TITLE", "build"]

KEY, TITLE = "runs", "Runs"


def build(runs: Sequence[Run], labels: Sequence[str]) -> list[Item]:
    rows = {
        "status": [run.status for run in runs],
        "steps done": [count(run.records.last_step) + (f" of {count(run.steps)}" if run.steps else "") for run in runs],
        "training loss": [with_unit(_last_loss(run), run.records.loss_unit) for run in runs],
        "validation loss": [with_unit(_last_validation(run), run.records.loss_unit) for run in runs],
        "largest RMS": [_largest(run) for run in runs],
        "skipped steps": [count(run.records.training[-1].skipped_steps) for run in runs],
        "tokens/s": [count(run.summary.get("tokens_per_second")) for run in runs],
        "seconds since the last start": [count(run.summary.get("seconds")) for run in runs],
        "parameters": [count(run.summary.get("parameters")) for run in runs],
    }
    shown = with_values([[key, *row] for key, row in rows.items()])
    items: list[Item] = [Table(caption="Each run at its last record", headings=["value", *labels], rows=shown)]
    for run, label in pairs(runs, labels):
        if run.records.restarts:
            steps = ", ".join(map(count, run.records.restarts))
            items.append(Note(f"{label} was resumed; the records before were dropped from step {steps} on."))
        if run.records.unreadable:
            items.append(Note(f"{label}: {count(run.records.unreadable)} lines of metrics.jsonl are no records and were left out."))
    return items


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
