"""Update clipping: how many tensors, which, and how much."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from sharded_optim.tools.report.charts import Item, LineChart, Note, Series, Table
from sharded_optim.tools.report.sections.series import MOST_LISTED, count, line_chart, number, over_steps, pairs, titled
from sharded_optim.tools.runs import Run

__all__ = ["KEY", "TITLE", "build"]

KEY, TITLE = "clipping", "Update clipping"
MOST_CLIPPED = 6  # tensors whose curves are drawn


def build(runs: Sequence[Run], labels: Sequence[str]) -> list[Item]:
    items = line_chart(
        runs,
        labels,
        lambda record: {"": record.optimizer["clipped_share"]} if "clipped_share" in record.optimizer else {},
        key="clipped_share",
        title="Share of tensors that are clipped",
        explanation="Tensors whose clip factor is below 1, of all tensors that have one.",
        unit="share of tensors",
        absent="Clip factors of {label}: left out, as no record has clipped_share; optimizers without update clipping record none.",
        from_zero=True,
    )
    for run, label in pairs(runs, labels):
        factors = over_steps(run, lambda record: record.by_name("clip_factor"))
        if factors:
            items += _most_clipped(factors, label, len(runs) > 1)
    return items


def _most_clipped(factors: Mapping[str, tuple[list[int], list[float]]], label: str, several: bool) -> list[Item]:
    means = {name: float(np.nanmean(values)) for name, (_, values) in factors.items() if np.isfinite(values).any()}
    clipped = sorted((name for name in means if min(v for v in factors[name][1] if math.isfinite(v)) < 1.0), key=means.__getitem__)
    if not clipped:
        return [Note(f"No tensor of {label} was clipped in a step that is recorded.")]
    series = [
        Series(name=name, steps=factors[name][0], values=factors[name][1], color=index, dash=index)
        for index, name in enumerate(clipped[:MOST_CLIPPED])
    ]
    rows = []
    for name in clipped[:MOST_LISTED]:
        steps, values = factors[name]
        finite = [(value, step) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        least, step = min(finite)
        share = sum(value < 1.0 for value, _ in finite) / len(finite)
        rows.append([name, number(means[name]), number(least), count(step), f"{share:.1%}"])
    more = f", the first {MOST_LISTED} of {len(clipped):,}" if len(clipped) > MOST_LISTED else ""
    return [
        LineChart(
            key=f"clip_factors_{label}",
            title=titled("Clip factors of the most clipped tensors", label, several),
            explanation="The factor multiplies a tensor's learning rate. Shown are the tensors with the smallest means over all records.",
            unit="clip factor",
            series=series,
            from_zero=True,
        ),
        Table(
            caption=titled("Clipped tensors, most clipped first", label, several) + more,
            headings=["tensor", "mean factor", "smallest", "at step", "clipped in"],
            rows=rows,
        ),
    ]
