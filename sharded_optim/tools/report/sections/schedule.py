"""Learning rate and weight decay of each param group."""

from __future__ import annotations

from collections.abc import Sequence

from sharded_optim.tools.report.charts import Item
from sharded_optim.tools.report.sections.series import line_chart
from sharded_optim.tools.runs import Run, TrainingRecord

__all__ = ["KEY", "TITLE", "build"]

KEY, TITLE = "schedule", "Learning rate and weight decay"


def build(runs: Sequence[Run], labels: Sequence[str]) -> list[Item]:
    def lr(record: TrainingRecord) -> dict[str, float]:
        groups = {f"group {name}": value for name, value in record.by_name("lr").items()}
        if len(set(groups.values())) == 1:
            return {"": next(iter(groups.values()))}  # one curve where groups have the same
        return groups or ({} if record.lr is None else {"": record.lr})

    items = line_chart(
        runs,
        labels,
        lr,
        key="lr",
        title="Learning rate",
        explanation="Of each param group; one curve where all groups have the same.",
        unit="learning rate",
        absent="Learning rate of {label}: left out, as no record has one.",
        from_zero=True,
    )
    return items + line_chart(
        runs,
        labels,
        lambda record: {f"group {name}": value for name, value in record.by_name("weight_decay").items()},
        key="weight_decay",
        title="Weight decay of a step",
        explanation="The share of a parameter that a step takes away, before update clipping, for each param group.",
        unit="share of a parameter",
        absent="Weight decay of {label}: left out, as no record has weight_decay/GROUP.",
        from_zero=True,
    )
