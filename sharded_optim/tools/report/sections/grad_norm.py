"""Norm of all gradients."""

from __future__ import annotations

from collections.abc import Sequence

from sharded_optim.tools.report.charts import Item
from sharded_optim.tools.report.sections.series import line_chart
from sharded_optim.tools.runs import Run

__all__ = ["KEY", "TITLE", "build"]

KEY, TITLE = "grad-norm", "Gradient norm"


def build(runs: Sequence[Run], labels: Sequence[str]) -> list[Item]:
    return line_chart(
        runs,
        labels,
        lambda record: {"": record.optimizer["grad_norm"]} if "grad_norm" in record.optimizer else {},
        key="grad_norm",
        title="Norm of all gradients",
        explanation="Before clipping.",
        unit="norm",
        absent="Gradient norm of {label}: left out, as no record has grad_norm; it is there where the job computes one.",
        log=True,
    )
