"""Training and validation loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sharded_optim.tools.report.charts import Item, LineChart, Series
from sharded_optim.tools.report.palette import SERIES
from sharded_optim.tools.report.sections.series import left_out, losses, titled
from sharded_optim.tools.report.sections.spikes import loss_spikes
from sharded_optim.tools.runs import REFERENCE_LOSSES, Run

__all__ = ["build"]

JOBS_UNIT = "bits per byte"  # unit of the training job, whose records are means over several steps


def build(runs: Mapping[str, Run]) -> list[Item]:
    several = len(runs) > 1
    series: list[Series] = []
    for index, (label, run) in enumerate(runs.items()):
        steps, values = losses(run)
        if steps:
            name = titled("training", label, runs)
            series.append(Series(name=name, steps=steps, values=values, color=index, dash=index // SERIES, faint=True))
    for index, (label, run) in enumerate(runs.items()):
        if run.records.validation:
            steps, values = zip(*((record.step, record.loss) for record in run.records.validation), strict=True)
            name, color = titled("validation", label, runs), index if several else 1
            series.append(Series(name=name, steps=steps, values=values, color=color, dash=index // SERIES, markers=True))
    items: list[Item] = [_chart(runs, series)] if series else []
    without = [label for label, run in runs.items() if not losses(run)[0]]
    items += left_out("Training loss of {label}: left out, as no record has one; log it as loss.", without)
    unvalidated = [label for label, run in runs.items() if not run.records.validation]
    return items + left_out("{label}: no validation record yet.", unvalidated)


def _chart(runs: Mapping[str, Run], series: Sequence[Series]) -> LineChart:
    levels = {}
    for name, key in REFERENCE_LOSSES:
        values = {run.summary.get(key) for run in runs.values()}
        if len(values) == 1 and isinstance(value := values.pop(), float):  # runs on different texts have no common level
            levels[name] = value
    units = {run.records.loss_unit for run in runs.values()}
    explanation = "The training loss is the mean over the steps since the record before. " if units == {JOBS_UNIT} else ""
    explanation += "Dashed: the entropy of single bytes, and what zlib needs for the validation text." if levels else ""
    return LineChart(
        key="loss",
        title="Training and validation loss",
        explanation=explanation or "As the run has logged it.",
        unit=(units.pop() if len(units) == 1 else "") or "loss",
        series=series,
        levels=list(levels.items()),
        marked=[
            (titled("loss spikes", label, runs), [step for step, _ in loss_spikes(run.records.training)]) for label, run in runs.items()
        ],
    )
