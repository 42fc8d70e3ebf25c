"""Tokens per second, and time and bandwidth of the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sharded_optim.tools.report.charts import Item, StackChart
from sharded_optim.tools.report.sections.series import left_out, line_chart, over_steps, pairs, titled
from sharded_optim.tools.runs import Run

__all__ = ["KEY", "TITLE", "build"]

KEY, TITLE = "speed", "Throughput and time of a step"
PARTS = ("observe", "agree", "matrices", "update")  # of a step, in order


def build(runs: Sequence[Run], labels: Sequence[str]) -> list[Item]:
    items = line_chart(
        runs,
        labels,
        lambda record: {} if record.tokens_per_second is None else {"": record.tokens_per_second},
        key="tokens_per_second",
        title="Tokens per second",
        explanation="Of all ranks together, without validation.",
        unit="tokens/s",
        absent="Throughput of {label}: left out, as no record has tokens_per_second.",
        from_zero=True,
    )
    without: list[str] = []
    for run, label in pairs(runs, labels):
        parts = over_steps(run, lambda record: record.by_name("ms"))
        if not parts:
            without.append(label)
            continue
        steps = sorted({step for part_steps, _ in parts.values() for step in part_steps})
        ordered = sorted(parts, key=lambda name: (PARTS.index(name) if name in PARTS else len(PARTS), name))
        values = {name: dict(zip(*parts[name], strict=True)) for name in ordered}
        items.append(
            StackChart(
                key=f"step_time_{label}",
                title=titled("Time of the optimizer's step by part", label, len(runs) > 1),
                explanation="Milliseconds of this rank in the step of each record, without forward and backward. Rare long steps, as the "
                "first, are cut off: the table has them.",
                unit="ms",
                steps=steps,
                parts=[(name, [values[name].get(step, math.nan) for step in steps]) for name in ordered],
            )
        )
    items += left_out("Time of a step of {label} by part: left out, as no record has ms/PART.", without)
    return items + line_chart(
        runs,
        labels,
        lambda record: {"": record.optimizer["gb_per_s"]} if "gb_per_s" in record.optimizer else {},
        key="gb_per_s",
        title="Memory bandwidth of the optimizer's step",
        explanation="Bytes that the step reads and writes on this rank, by its time.",
        unit="GB/s",
        absent="Memory bandwidth of {label}: left out, as no record has gb_per_s.",
        from_zero=True,
    )
