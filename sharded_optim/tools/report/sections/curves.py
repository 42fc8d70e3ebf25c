"""Charts of the gradient norm, the schedule and the speed, from training records."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sharded_optim.tools.report.charts import Item, LineChart, Series
from sharded_optim.tools.report.sections.series import left_out, line_chart, over_steps, titled
from sharded_optim.tools.runs import Run, TrainingRecord

__all__ = ["grad_norm", "schedule", "speed"]

PARTS = ("observe", "agree", "matrices", "update")  # parts of a step, in order


def grad_norm(runs: Mapping[str, Run]) -> list[Item]:
    return line_chart(
        runs,
        "grad_norm",
        "Norm of all gradients",
        "Before clipping.",
        unit="norm",
        absent="Gradient norm of {label}: left out, as no record has grad_norm; it is there where the job computes one.",
        log=True,
    )


def schedule(runs: Mapping[str, Run]) -> list[Item]:
    """Show learning rate and weight decay of each param group."""
    return line_chart(
        runs,
        "lr",
        "Learning rate",
        "Of each param group; one curve where all groups have the same.",
        unit="learning rate",
        absent="Learning rate of {label}: left out, as no record has one.",
        values_of=_learning_rates,
    ) + line_chart(
        runs,
        "weight_decay",
        "Weight decay of a step",
        "The share of a parameter that a step takes away, before update clipping, for each param group.",
        unit="share of a parameter",
        absent="Weight decay of {label}: left out, as no record has weight_decay/GROUP.",
        values_of=lambda record: _of_groups(record, "weight_decay"),
    )


def speed(runs: Mapping[str, Run]) -> list[Item]:
    """Show tokens per second, and time and bandwidth of the optimizer's step."""
    items = line_chart(
        runs,
        "tokens_per_second",
        "Tokens per second",
        "Of all ranks together, without validation.",
        unit="tokens/s",
        absent="Throughput of {label}: left out, as no record has tokens_per_second.",
        values_of=lambda record: {} if record.tokens_per_second is None else {"": record.tokens_per_second},
    )
    times = {label: over_steps(run, lambda record: record.by_name("ms")) for label, run in runs.items()}
    items += [_step_time(parts, label, runs) for label, parts in times.items() if parts]
    without = [label for label, parts in times.items() if not parts]
    items += left_out("Time of a step of {label} by part: left out, as no record has ms/PART.", without)
    return items + line_chart(
        runs,
        "gb_per_s",
        "Memory bandwidth of the optimizer's step",
        "Bytes that the step reads and writes on this rank, by its time.",
        unit="GB/s",
        absent="Memory bandwidth of {label}: left out, as no record has gb_per_s.",
    )


def _learning_rates(record: TrainingRecord) -> dict[str, float]:
    groups = _of_groups(record, "lr")
    if len(set(groups.values())) == 1:
        return {"": next(iter(groups.values()))}
    return groups or ({} if record.lr is None else {"": record.lr})


def _of_groups(record: TrainingRecord, kind: str) -> dict[str, float]:
    return {f"group {name}": value for name, value in record.by_name(kind).items()}


def _step_time(parts: Mapping[str, tuple[list[int], list[float]]], label: str, runs: Mapping[str, Run]) -> LineChart:
    steps = sorted({step for part_steps, _ in parts.values() for step in part_steps})
    series = []
    for name in sorted(parts, key=lambda name: (PARTS.index(name) if name in PARTS else len(PARTS), name)):
        values = dict(zip(*parts[name], strict=True))
        series.append(Series(name=name, steps=steps, values=[values.get(step, math.nan) for step in steps], color=len(series)))
    return LineChart(
        key=f"step_time_{label}",
        title=titled("Time of the optimizer's step by part", label, runs),
        explanation="Milliseconds of this rank in the step of each record, without forward and backward. Rare long steps, as the "
        "first, are cut off: the table has them.",
        unit="ms",
        series=series,
        stacked=True,
    )
