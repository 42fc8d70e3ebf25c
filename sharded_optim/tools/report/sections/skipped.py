"""Skipped steps, and the tensors that were not finite."""

from __future__ import annotations

from collections.abc import Sequence

from sharded_optim.tools.report.charts import Item, Table
from sharded_optim.tools.report.sections.series import MOST_LISTED, count, left_out, line_chart, pairs
from sharded_optim.tools.runs import Run, TrainingRecord

__all__ = ["KEY", "TITLE", "build"]

KEY, TITLE = "skipped", "Skipped steps and non-finite gradients"
MOST_RANKS = 8  # in a cell


def build(runs: Sequence[Run], labels: Sequence[str]) -> list[Item]:
    items = line_chart(
        runs,
        labels,
        lambda record: {} if record.skipped_steps is None else {"": float(record.skipped_steps)},
        key="skipped_steps",
        title="Skipped steps",
        explanation="Since the run began. A step is skipped where a gradient is not finite.",
        unit="steps",
        absent="Skipped steps of {label}: left out, as no record has skipped_steps.",
        from_zero=True,
    )
    finite, without = [], []
    for run, label in pairs(runs, labels):
        events = [
            [count(record.step), name, count(pieces), _ranks(record, name)]
            for record in run.records.training
            for name, pieces in record.by_name("non_finite").items()
            if not pieces <= 0.0
        ]
        if events:
            more = f", the first {MOST_LISTED} of {len(events):,}" if len(events) > MOST_LISTED else ""
            caption = f"Tensors of {label} whose gradient was not finite in a step that is recorded{more}"
            items.append(Table(caption=caption, headings=["step", "tensor", "pieces", "on ranks"], rows=events[:MOST_LISTED]))
        elif any("non_finite_tensors" in record.optimizer for record in run.records.training):
            finite.append(label)
        else:
            without.append(label)
    items += left_out("Tensors of {label} with a non-finite gradient: none in the steps that are recorded.", finite)
    return items + left_out("Tensors of {label} with a non-finite gradient: left out, as no record has non_finite_tensors.", without)


def _ranks(record: TrainingRecord, name: str) -> str:
    """Return the ranks that held such a piece; a dash where they are not recorded."""
    ranks = record.non_finite_ranks.get(name, [])
    more = f" and {len(ranks) - MOST_RANKS} more" if len(ranks) > MOST_RANKS else ""
    return ", ".join(map(str, ranks[:MOST_RANKS])) + more if ranks else "-"
