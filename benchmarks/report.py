"""Reports: JSON for machines, Markdown for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import summary
from benchmarks.records import CaseRecord, Run

__all__ = ["contender_names", "markdown", "table", "write"]

NOTHING = "-"


def write(folder: Path, stem: str, record: Any, text: str) -> None:
    """Write `record`, a dataclass or a dict, to <stem>.json and `text` to <stem>.md."""
    folder.mkdir(parents=True, exist_ok=True)
    content = asdict(record) if is_dataclass(record) and not isinstance(record, type) else record
    (folder / f"{stem}.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / f"{stem}.md").write_text(text, encoding="utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text: int = 1) -> str:
    """A Markdown table whose first `text` columns are text and whose others are numbers."""
    rule = ["---" if index < text else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def contender_names(cases: Sequence[CaseRecord], order: Sequence[str]) -> list[str]:
    """Everyone who is in one of the cases, or should be."""
    names = {each.contender for case in cases for each in (*case.results, *case.missing)}
    return [name for name in order if name in names]


def markdown(run: Run) -> str:
    """The ratios first, then what many tensors cost, then everything about each case."""
    parts = [
        f"# Time of a step, ratio to {run.baseline}",
        f"Below 1 is faster. {summary(run.environment)}",
        f"`{run.environment['command']}`, commit {run.environment['commit']}",
    ]
    for dtype in dict.fromkeys(case.dtype for case in run.cases):
        cases = [case for case in run.cases if case.dtype == dtype]
        parts += [f"## Parameters and gradients in {dtype}", _ratios(cases, run.contenders)]
    parts += _many_tensors(run)
    parts += _reasons(run)
    if run.remarks:
        parts += ["## Remarks", "\n".join(f"- {remark}" for remark in dict.fromkeys(run.remarks))]
    streams = [[f"`{s.operation}`", s.storage, f"{s.gigabytes_per_second:.1f}"] for s in run.streams]
    parts += ["## What the memory gives", table(["torch, fp32", "memory", "GB/s"], streams, text=2)]
    for case in run.cases:
        parts += [f"## {case.title}: {_size(case)}", _details(case)]
    return "\n\n".join(parts) + "\n"


def _size(case: CaseRecord) -> str:
    return f"{case.elements:,} elements in {case.tensors:,} tensor{'' if case.tensors == 1 else 's'}"


def _ratios(cases: Sequence[CaseRecord], order: Sequence[str]) -> str:
    rows = []
    for name in contender_names(cases, order):
        found = [case.of(name) for case in cases]
        rows.append([name, *(NOTHING if result is None else f"{result.ratio:.2f}" for result in found)])
    return table(["", *(case.name for case in cases)], rows)


def _many_tensors(run: Run) -> list[str]:
    """A step on many tensors against a step on one of as many elements."""
    pairs = [(case, one) for case in run.cases for one in run.cases if (one.name, one.dtype) == (case.same_elements, case.dtype)]
    if not pairs:
        return []
    rows = []
    for name in contender_names([case for case, _ in pairs], run.contenders):
        found = [(case.of(name), one.of(name)) for case, one in pairs]
        rows.append(
            [name, *(NOTHING if many is None or one is None else _times(many.milliseconds, one.milliseconds) for many, one in found)]
        )
    return ["## Many tensors against one", table(["milliseconds, ratio", *(f"{case.title} / {one.name}" for case, one in pairs)], rows)]


def _times(many: float, one: float) -> str:
    return f"{many:.2f} / {one:.2f} = {many / one:.2f}"


def _reasons(run: Run) -> list[str]:
    """Who is missing, once per reason."""
    cases: dict[tuple[str, str], list[str]] = {}
    for case in run.cases:
        for each in case.missing:
            cases.setdefault((each.contender, each.reason), []).append(case.title)
    if not cases:
        return []
    lines = [
        f"- {contender}, {'in all cases' if len(where) == len(run.cases) else ', '.join(where)}: {reason}"
        for (contender, reason), where in cases.items()
    ]
    return ["## Not measured", "\n".join(lines)]


def _details(case: CaseRecord) -> str:
    rows = []
    for result in case.results:
        low, high = result.quartiles
        rows.append(
            [
                result.contender,
                result.state
                + ("" if result.shared_moments else " (its own)")
                + (" (writes to gradients)" if result.writes_gradients else ""),
                f"{result.milliseconds:.2f}",
                f"{low:.2f} - {high:.2f}",
                str(result.samples),
                f"{result.ratio:.3f}",
                f"{result.ratio_quartiles[0]:.3f} - {result.ratio_quartiles[1]:.3f}",
                str(result.bytes_per_element),
                f"{result.gigabytes_per_second:.1f}",
                f"{result.percent_of_stream:.0f}",
            ]
        )
    header = ["", "state", "ms", "quartiles", "samples", "ratio", "quartiles", "bytes/element", "GB/s", "% of stream"]
    return table(header, rows, text=2)
