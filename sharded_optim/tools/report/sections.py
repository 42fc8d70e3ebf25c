"""Turn runs into the sections of a report. What a run has not recorded becomes a note that says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from sharded_optim.tools.report.charts import HeatMap, Item, LineChart, Note, Section, Series, StackChart, Table
from sharded_optim.tools.report.palette import SERIES
from sharded_optim.tools.runs import Run, TrainingRecord

__all__ = ["LOSS_SPIKE", "RMS_SPIKE", "loss_spikes", "rms_spikes", "sections_of"]

# The definitions of Wortsman et al., "Stable and low-precision training for large-scale vision-language models" (2023), appendix D: an RMS
# of at least 2.3; a loss of more than 3.2 running standard deviations above its running mean; those within 10 of an earlier one are one.
RMS_SPIKE = 2.3
LOSS_SPIKE = 3.2
RUNNING_LOSSES = 20  # records over which mean and deviation are taken; the paper gives no number, and of more the fall of a loss is seen
LEAST_LOSSES = 10  # before the first loss spike: of fewer, mean and deviation say little
APART = 10  # records

MOST_COLUMNS = 1200  # of a heat map, about the pixels of a page's width
MOST_ROWS = 120  # of a heat map
MOST_CLIPPED = 6  # tensors whose curves are drawn
MOST_LISTED = 20  # rows of tables of tensors or events
ROW_HEADINGS = ("row", "tensor", "largest", "at step", "median", "last")
PARTS = ("observe", "agree", "matrices", "update")  # of a step, in order


def sections_of(runs: Sequence[Run], labels: Sequence[str]) -> list[Section]:
    """Return the sections of a report in their order.

    Args:
        runs: each with at least one training record.
        labels: a different name for each run.
    """
    return [
        Section(key="runs", title="Runs", items=_overview(runs, labels)),
        Section(key="loss", title="Loss", items=_loss(runs, labels)),
        Section(key="rms", title="Update RMS", items=_rms(runs, labels)),
        Section(key="clipping", title="Update clipping", items=_clipping(runs, labels)),
        Section(key="grad-norm", title="Gradient norm", items=_grad_norm(runs, labels)),
        Section(key="schedule", title="Learning rate and weight decay", items=_schedule(runs, labels)),
        Section(key="speed", title="Throughput and time of a step", items=_speed(runs, labels)),
        Section(key="skipped", title="Skipped steps and non-finite gradients", items=_skipped(runs, labels)),
        Section(key="config", title="Config", items=_config(runs, labels)),
        Section(key="environment", title="Environment", items=_environment(runs, labels)),
    ]


# --------------------------------------------------------------------------------------------------------------------------- spikes


def rms_spikes(records: Sequence[TrainingRecord]) -> list[tuple[int, str, float]]:
    """Return (step, tensor, RMS) of the records whose largest RMS is a spike. A NaN is none: it is a non-finite gradient."""
    found: list[tuple[int, str, float]] = []
    last = -APART - 1
    for index, record in enumerate(records):
        name, largest = largest_rms(record)
        if name is not None and largest >= RMS_SPIKE and index - last > APART:
            found.append((record.step, name, largest))
            last = index
    return found


def loss_spikes(records: Sequence[TrainingRecord]) -> list[tuple[int, float]]:
    """Return (step, loss) of the records whose loss is a spike."""
    found: list[tuple[int, float]] = []
    last = -APART - 1
    losses = [record.loss for record in records]
    for index, record in enumerate(records):
        before = np.array([loss for loss in losses[max(0, index - RUNNING_LOSSES) : index] if math.isfinite(loss)])
        if len(before) < LEAST_LOSSES or index - last <= APART:
            continue
        if record.loss > before.mean() + LOSS_SPIKE * before.std():
            found.append((record.step, record.loss))
            last = index
    return found


def largest_rms(record: TrainingRecord) -> tuple[str | None, float]:
    """Return the tensor with the largest finite RMS of a record and that RMS; (None, NaN) without one."""
    finite = {name: value for name, value in record.by_name("rms").items() if math.isfinite(value)}
    if finite:
        name = max(finite, key=finite.__getitem__)
        return name, finite[name]
    if record.largest_rms is not None and math.isfinite(record.largest_rms):
        return record.largest_rms_name, record.largest_rms
    return None, math.nan


# ------------------------------------------------------------------------------------------------------------------------- sections


def _overview(runs: Sequence[Run], labels: Sequence[str]) -> list[Item]:
    rows = {
        "status": [run.status for run in runs],
        "steps done": [_count(run.records.last_step) + (f" of {_count(run.steps)}" if run.steps else "") for run in runs],
        "training loss, bits per byte": [_number(run.records.training[-1].loss) for run in runs],
        "validation, bits per byte": [_number(run.records.validation[-1].bits_per_byte) if run.records.validation else "-" for run in runs],
        "largest RMS": [_largest(run) for run in runs],
        "skipped steps": [_count(run.records.training[-1].skipped_steps) for run in runs],
        "tokens/s": [_count(run.summary.get("tokens_per_second")) for run in runs],
        "seconds since the last start": [_count(run.summary.get("seconds")) for run in runs],
        "parameters": [_count(run.summary.get("parameters")) for run in runs],
    }
    items: list[Item] = [
        Table(caption="Each run at its last record", headings=["value", *labels], rows=[[key, *row] for key, row in rows.items()])
    ]
    for run, label in zip(runs, labels, strict=True):
        if run.records.restarts:
            steps = ", ".join(map(_count, run.records.restarts))
            items.append(Note(f"{label} was resumed; the records before were dropped from step {steps} on."))
        if run.records.unreadable:
            items.append(Note(f"{label}: {_count(run.records.unreadable)} lines of metrics.jsonl are no records and were left out."))
    return items


def _largest(run: Run) -> str:
    found = [(value, name, record.step) for record in run.records.training for name, value in [largest_rms(record)] if name is not None]
    if not found:
        return "-"
    value, name, step = max(found)
    return f"{_number(value)} at step {_count(step)}, {name}"


def _loss(runs: Sequence[Run], labels: Sequence[str]) -> list[Item]:
    several = len(runs) > 1
    series: list[Series] = []
    for index, (run, label) in enumerate(zip(runs, labels, strict=True)):
        steps, losses = zip(*((record.step, record.loss) for record in run.records.training), strict=True)
        series.append(
            Series(name=_of("training", label, several), steps=steps, values=losses, color=index, dash=index // SERIES, faint=True)
        )
    for index, (run, label) in enumerate(zip(runs, labels, strict=True)):
        if run.records.validation:
            steps, losses = zip(*((record.step, record.bits_per_byte) for record in run.records.validation), strict=True)
            color = index if several else 1
            series.append(
                Series(name=_of("validation", label, several), steps=steps, values=losses, color=color, dash=index // SERIES, markers=True)
            )
    levels = {}
    for name, key in (("unigram", "unigram_bits_per_byte"), ("zlib", "zlib_bits_per_byte")):
        values = {run.summary.get(key) for run in runs}
        if len(values) == 1 and isinstance(value := values.pop(), float):  # runs on different texts have no common level
            levels[name] = value
    chart = LineChart(
        key="loss",
        title="Training and validation loss",
        explanation="The training loss is the mean over the steps since the record before. "
        + ("Dashed: the entropy of single bytes, and what zlib needs for the validation text." if levels else ""),
        unit="bits per byte",
        series=series,
        levels=list(levels.items()),
        marked=[
            (_of("loss spikes", label, several), [step for step, _ in loss_spikes(run.records.training)])
            for run, label in _pairs(runs, labels)
        ],
    )
    items: list[Item] = [chart]
    items += [Note(f"{label} has no validation record yet.") for run, label in _pairs(runs, labels) if not run.records.validation]
    return items


def _rms(runs: Sequence[Run], labels: Sequence[str]) -> list[Item]:
    items: list[Item] = []
    series: list[Series] = []
    without: list[str] = []
    for index, (run, label) in enumerate(_pairs(runs, labels)):
        points = [(record.step, largest_rms(record)[1]) for record in run.records.training if _has_rms(record)]
        if points:
            steps, values = zip(*points, strict=True)
            series.append(Series(name=label, steps=steps, values=values, color=index, dash=index // SERIES))
        else:
            without.append(label)
    if series:
        chart = LineChart(
            key="largest_rms",
            title="Largest RMS of any tensor",
            explanation="The root mean of g²/max(v, eps²) over a tensor. Large: the second moment lags behind the gradient.",
            unit="RMS",
            series=series,
            levels=[("update clipping begins", 1.0), ("spike", RMS_SPIKE)],
        )
        items.append(chart)
    items += _left_out("RMS of {label}: left out, as no record has one; optimizers without update clipping report none.", without)
    only_largest = []
    for run, label in _pairs(runs, labels):
        if any(record.by_name("rms") for record in run.records.training):
            items.append(_heat_map(run, label, len(runs) > 1))
        elif label not in without:
            only_largest.append(label)
    items += _left_out("RMS of each tensor of {label}: left out, as records have the largest RMS alone, and no rms/NAME.", only_largest)
    items += [table for run, label in _pairs(runs, labels) if (table := _spike_table(run, label)) is not None]
    return items


def _has_rms(record: TrainingRecord) -> bool:
    return record.largest_rms is not None or any(key.startswith("rms/") for key in record.optimizer)


def _heat_map(run: Run, label: str, several: bool) -> HeatMap:
    records = [record for record in run.records.training if record.by_name("rms")]
    by_step = {record.step: record.by_name("rms") for record in records}
    names = list(dict.fromkeys(name for values in by_step.values() for name in values))
    table = np.full((len(names), len(records)), np.nan)
    place = {name: row for row, name in enumerate(names)}
    for column, values in enumerate(by_step.values()):
        for name, value in values.items():
            table[place[name], column] = value if math.isfinite(value) else np.nan
    largest = np.fmax.reduce(table, axis=1)
    kept = np.arange(len(names))
    explanation = "Rows are tensors in the order of the model. "
    if len(names) > MOST_ROWS:
        kept = np.sort(np.argsort(-np.nan_to_num(largest, nan=-1.0), kind="stable")[:MOST_ROWS])
        explanation += f"Of {len(names):,} tensors those {MOST_ROWS} with the largest RMS. "
    steps, columns = _in_columns(list(by_step), table[kept])
    if len(steps) < len(records):
        explanation += "Each column is the largest of several records. "
    spikes = rms_spikes(run.records.training)
    rows = []
    for row, index in enumerate(kept):
        values = table[index]
        finite = values[np.isfinite(values)]
        if not len(finite):
            rows.append([str(row + 1), names[index], "-", "-", "-", "-"])
            continue
        step = list(by_step)[int(np.nanargmax(values))]
        last = _number(values[-1]) if math.isfinite(values[-1]) else "-"
        rows.append([str(row + 1), names[index], _number(finite.max()), _count(step), _number(float(np.median(finite))), last])
    return HeatMap(
        key=f"rms_{label}",
        title=_of("RMS of each tensor", label, several),
        explanation=explanation + f"Triangles in the loss above mark steps in which a tensor has an RMS of {RMS_SPIKE} or more.",
        unit="RMS",
        steps=steps,
        rows=[names[index] for index in kept],
        values=columns,
        loss=Series(
            name="training loss",
            steps=[record.step for record in run.records.training],
            values=[record.loss for record in run.records.training],
            color=0,
        ),
        spikes=[step for step, _, _ in spikes],
        spikes_name="RMS spikes",
        summary=Table(caption="RMS of each tensor over all records", headings=ROW_HEADINGS, rows=rows),
    )


def _in_columns(steps: Sequence[int], table: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Put records in columns that are equally far apart: the largest of those in a column, and the next record where there is none.

    Args:
        steps: (records,), rising.
        table: (rows, records).
    """
    if len(steps) == 1:
        return list(steps), table
    least = min(later - earlier for earlier, later in pairwise(steps))
    apart = max(least, math.ceil((steps[-1] - steps[0]) / (MOST_COLUMNS - 1)))
    places = [math.ceil((step - steps[0]) / apart) for step in steps]
    found = np.full((table.shape[0], places[-1] + 1), np.nan)
    for column, place in enumerate(places):
        found[:, place] = np.fmax(found[:, place], table[:, column])
    filled = set(places)
    for place in range(places[-1], -1, -1):
        if place not in filled:
            found[:, place] = found[:, place + 1]
    return [steps[0] + apart * place for place in range(places[-1] + 1)], found


def _spike_table(run: Run, label: str) -> Table | None:
    records = run.records.training
    events = [(step, "RMS", f"{_number(value)} of {name}") for step, name, value in rms_spikes(records)]
    events += [(step, "loss", f"{_number(value)} bits per byte") for step, value in loss_spikes(records)]
    if not events:
        return None
    events.sort()
    more = f"; the first {MOST_LISTED} of {len(events):,}" if len(events) > MOST_LISTED else ""
    caption = f"Spikes of {label}: RMS of {RMS_SPIKE} or more; loss more than {LOSS_SPIKE} running deviations above its running mean{more}"
    return Table(
        caption=caption, headings=["step", "of", "value"], rows=[[_count(step), kind, value] for step, kind, value in events[:MOST_LISTED]]
    )


def _clipping(runs: Sequence[Run], labels: Sequence[str]) -> list[Item]:
    items = _lines(
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
    for run, label in _pairs(runs, labels):
        factors = _over_steps(run, lambda record: record.by_name("clip_factor"))
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
        rows.append([name, _number(means[name]), _number(least), _count(step), f"{share:.1%}"])
    more = f", the first {MOST_LISTED} of {len(clipped):,}" if len(clipped) > MOST_LISTED else ""
    return [
        LineChart(
            key=f"clip_factors_{label}",
            title=_of("Clip factors of the most clipped tensors", label, several),
            explanation="The factor multiplies a tensor's learning rate. Shown are the tensors with the smallest means over all records.",
            unit="clip factor",
            series=series,
            from_zero=True,
        ),
        Table(
            caption=_of("Clipped tensors, most clipped first", label, several) + more,
            headings=["tensor", "mean factor", "smallest", "at step", "clipped in"],
            rows=rows,
        ),
    ]


def _grad_norm(runs: Sequence[Run], labels: Sequence[str]) -> list[Item]:
    return _lines(
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


def _schedule(runs: Sequence[Run], labels: Sequence[str]) -> list[Item]:
    def lr(record: TrainingRecord) -> dict[str, float]:
        groups = {f"group {name}": value for name, value in record.by_name("lr").items()}
        if len(set(groups.values())) == 1:
            return {"": next(iter(groups.values()))}  # one curve where groups have the same
        return groups or ({} if record.lr is None else {"": record.lr})

    items = _lines(
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
    return items + _lines(
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


def _speed(runs: Sequence[Run], labels: Sequence[str]) -> list[Item]:
    items = _lines(
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
    for run, label in _pairs(runs, labels):
        parts = _over_steps(run, lambda record: record.by_name("ms"))
        if not parts:
            without.append(label)
            continue
        steps = sorted({step for part_steps, _ in parts.values() for step in part_steps})
        ordered = sorted(parts, key=lambda name: (PARTS.index(name) if name in PARTS else len(PARTS), name))
        values = {name: dict(zip(*parts[name], strict=True)) for name in ordered}
        items.append(
            StackChart(
                key=f"step_time_{label}",
                title=_of("Time of the optimizer's step by part", label, len(runs) > 1),
                explanation="Milliseconds of this rank in the step of each record, without forward and backward. Rare long steps, as the "
                "first, are cut off: the table has them.",
                unit="ms",
                steps=steps,
                parts=[(name, [values[name].get(step, math.nan) for step in steps]) for name in ordered],
            )
        )
    items += _left_out("Time of a step of {label} by part: left out, as no record has ms/PART.", without)
    return items + _lines(
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


def _skipped(runs: Sequence[Run], labels: Sequence[str]) -> list[Item]:
    items = _lines(
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
    for run, label in _pairs(runs, labels):
        events = [
            [_count(record.step), name, _count(int(count)) if math.isfinite(count) else "-"]
            for record in run.records.training
            for name, count in record.by_name("non_finite").items()
            if not count <= 0.0
        ]
        if events:
            more = f", the first {MOST_LISTED} of {len(events):,}" if len(events) > MOST_LISTED else ""
            caption = f"Tensors of {label} whose gradient was not finite in a step that is recorded{more}"
            items.append(Table(caption=caption, headings=["step", "tensor", "pieces"], rows=events[:MOST_LISTED]))
        elif any("non_finite_tensors" in record.optimizer for record in run.records.training):
            finite.append(label)
        else:
            without.append(label)
    items += _left_out("Tensors of {label} with a non-finite gradient: none in the steps that are recorded.", finite)
    return items + _left_out("Tensors of {label} with a non-finite gradient: left out, as no record has non_finite_tensors.", without)


def _config(runs: Sequence[Run], labels: Sequence[str]) -> list[Item]:
    items: list[Item] = [Note(f"{label} has no config.yaml that can be read.") for run, label in _pairs(runs, labels) if not run.config]
    flat = [_flat(run.config) for run in runs]
    keys = list(dict.fromkeys(key for each in flat for key in each))
    # Null is the default of a key that was not given: a row of nulls says nothing.
    keys = [key for key in keys if any(each.get(key) is not None for each in flat)]
    if not keys:
        return items
    rows = [[key, *(_cell(each[key]) if key in each else "-" for each in flat)] for key in keys]
    marked = [index for index, row in enumerate(rows) if len(set(row[1:])) > 1]
    caption = "Keys of the config that are not null" + ("; bold rows differ between the runs" if marked else "")
    return [*items, Table(caption=caption, headings=["key", *labels], rows=rows, marked=marked)]


def _environment(runs: Sequence[Run], labels: Sequence[str]) -> list[Item]:
    items: list[Item] = [Note(f"{label} has no summary.json that can be read.") for run, label in _pairs(runs, labels) if not run.summary]
    names = ("torch", "device", "world_size", "sharding", "optimizer", "text")
    rows = [["folder", *(str(run.path) for run in runs)]]
    rows += [[name, *(_cell(run.summary[name]) if name in run.summary else "-" for run in runs)] for name in names]
    marked = [index for index, row in enumerate(rows) if index and len(set(row[1:])) > 1]
    return [*items, Table(caption="Where the runs ran", headings=["value", *labels], rows=rows, marked=marked)]


# -------------------------------------------------------------------------------------------------------------------------- helpers


def _lines(
    runs: Sequence[Run],
    labels: Sequence[str],
    values_of: Callable[[TrainingRecord], Mapping[str, float]],
    *,
    absent: str,
    **chart: Any,
) -> list[Item]:
    """A chart of values of records, and a note that names the runs that have none.

    Args:
        values_of: the values of a record by name; the empty name is the run itself.
        absent: the note, with {label}.
        chart: fields of the LineChart.
    """
    series: list[Series] = []
    without: list[str] = []
    for index, (run, label) in enumerate(_pairs(runs, labels)):
        found = _over_steps(run, values_of)
        if not found:
            without.append(label)
        for place, (name, (steps, values)) in enumerate(found.items()):
            full = ", ".join(part for part in (label if len(runs) > 1 or not name else "", name) if part)
            color = index if len(runs) > 1 else place
            series.append(Series(name=full, steps=steps, values=values, color=color, dash=place + index // SERIES))
    items: list[Item] = [LineChart(series=series, **chart)] if series else []
    return items + _left_out(absent, without)


def _left_out(reason: str, labels: Sequence[str]) -> list[Item]:
    """One note for all runs that a chart leaves out; the reason has {label} in the place of their names."""
    return [Note(reason.replace("{label}", ", ".join(labels)))] if labels else []


def _over_steps(run: Run, values_of: Callable[[TrainingRecord], Mapping[str, float]]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of everything that records name."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for record in run.records.training:
        for name, value in values_of(record).items():
            steps, values = found.setdefault(name, ([], []))
            steps.append(record.step)
            values.append(value)
    return found


def _pairs(runs: Sequence[Run], labels: Sequence[str]) -> Iterable[tuple[Run, str]]:
    return zip(runs, labels, strict=True)


def _of(what: str, label: str, several: bool) -> str:
    """Name the run where there are several."""
    return f"{what}, {label}" if several else what


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested config by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def _cell(value: Any) -> str:
    return "default" if value is None else str(value)


def _number(value: float) -> str:
    """Return four significant digits.

    >>> _number(2.0456), _number(0.0004), _number(float("nan"))
    ('2.046', '0.0004', 'not finite')
    """
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def _count(value: Any) -> str:
    """Return a number as an integer with separators; a dash for what is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return f"{value:,.0f}" if is_number else "-"
