"""Skipped steps, and the tensors that were not finite."""

from __future__ import annotations

from collections.abc import Mapping

from sharded_optim.tools.report.charts import Item
from sharded_optim.tools.report.sections.series import count, first_rows, left_out, line_chart
from sharded_optim.tools.runs import Run, TrainingRecord

__all__ = ["build"]

MOST_RANKS = 8  # most ranks that a cell names


def build(runs: Mapping[str, Run]) -> list[Item]:
    items = line_chart(
        runs,
        "skipped_steps",
        "Skipped steps",
        "Since the run began. A step is skipped where a gradient is not finite.",
        unit="steps",
        absent="Skipped steps of {label}: left out, as no record has skipped_steps.",
        values_of=lambda record: {} if record.skipped_steps is None else {"": float(record.skipped_steps)},
    )
    finite, without = [], []
    for label, run in runs.items():
        rows = [
            [count(record.step), name, count(pieces), _ranks(record, name)]
            for record in run.records.training
            for name, pieces in record.by_name("non_finite").items()
            if not pieces <= 0.0
        ]
        if rows:
            caption = f"Tensors of {label} whose gradient was not finite in a step that is recorded"
            items.append(first_rows(caption, ["step", "tensor", "pieces", "on ranks"], rows))
        elif any("non_finite_tensors" in record.optimizer for record in run.records.training):
            finite.append(label)
        else:
            without.append(label)
    items += left_out("Tensors of {label} with a non-finite gradient: none in the steps that are recorded.", finite)
    return items + left_out("Tensors of {label} with a non-finite gradient: left out, as no record has non_finite_tensors.", without)


def _ranks(record: TrainingRecord, name: str) -> str:
    """Format the ranks that held a non-finite piece of a tensor; a dash if they are not recorded."""
    ranks = record.non_finite_ranks.get(name, [])
    more = f" and {len(ranks) - MOST_RANKS} more" if len(ranks) > MOST_RANKS else ""
    return ", ".join(map(str, ranks[:MOST_RANKS])) + more if ranks else "-"
