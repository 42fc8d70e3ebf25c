"""Update clipping: the share of tensors that are clipped, and how much each tensor is clipped."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from sharded_optim.tools.report.charts import Item, LineChart, Note, Series
from sharded_optim.tools.report.sections.series import count, first_rows, line_chart, number, over_steps, titled
from sharded_optim.tools.runs import Run

__all__ = ["build"]

MOST_CLIPPED = 6  # tensors whose curves are drawn


def build(runs: Mapping[str, Run]) -> list[Item]:
    items = line_chart(
        runs,
        "clipped_share",
        "Share of tensors that are clipped",
        "Tensors whose clip factor is below 1, of all tensors that have one.",
        unit="share of tensors",
        absent="Clip factors of {label}: left out, as no record has clipped_share; optimizers without update clipping record none.",
    )
    for label, run in runs.items():
        factors = over_steps(run, lambda record: record.by_name("clip_factor"))
        if factors:
            items += _most_clipped(factors, label, runs)
    return items


def _most_clipped(factors: Mapping[str, tuple[list[int], list[float]]], label: str, runs: Mapping[str, Run]) -> list[Item]:
    rows = []
    for name, (steps, values) in factors.items():
        finite = [(value, step) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        least, step = min(finite, default=(1.0, 0))
        if least < 1.0:
            share = sum(value < 1.0 for value, _ in finite) / len(finite)
            rows.append((float(np.nanmean(values)), name, number(least), count(step), f"{share:.1%}"))
    if not rows:
        return [Note(f"No tensor of {label} was clipped in a step that is recorded.")]
    rows.sort(key=lambda row: row[0])
    names = [name for _, name, *_ in rows[:MOST_CLIPPED]]
    return [
        LineChart(
            key=f"clip_factors_{label}",
            title=titled("Clip factors of the most clipped tensors", label, runs),
            explanation="The factor multiplies a tensor's learning rate. Shown are the tensors with the smallest means over all records.",
            unit="clip factor",
            series=[
                Series(name=name, steps=factors[name][0], values=factors[name][1], color=index, dash=index)
                for index, name in enumerate(names)
            ],
            from_zero=True,
        ),
        first_rows(
            titled("Clipped tensors, most clipped first", label, runs),
            ["tensor", "mean factor", "smallest", "at step", "clipped in"],
            [[name, number(mean), *others] for mean, name, *others in rows],
        ),
    ]
