"""Reports: JSON for machines, Markdown for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import summary
from benchmarks.records import CaseRecord, Profile, Run, Share, Verdict

__all__ = ["contender_names", "markdown", "short", "table", "write"]

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
    """The ratios first, then targets and what many tensors cost, then everything about each case, and what steps are made of."""
    parts = [
        f"# Time of a step, ratio to {run.baseline}",
        f"Below 1 is faster. {summary(run.environment)}",
        f"`{run.environment['command']}`, commit {run.environment['commit']}",
    ]
    for dtype in dict.fromkeys(case.dtype for case in run.cases):
        cases = [case for case in run.cases if case.dtype == dtype]
        parts += [f"## Parameters and gradients in {dtype}", _ratios(cases, run.contenders)]
    parts += _verdicts(run.verdicts)
    parts += _many_tensors(run)
    parts += _reasons(run)
    if run.remarks:
        parts += ["## Remarks", "\n".join(f"- {remark}" for remark in dict.fromkeys(run.remarks))]
    streams = [
        [f"`{s.operation}`", s.storage, s.when, f"{s.gigabytes_per_second:.1f}", f"{s.median_gigabytes_per_second:.1f}"]
        for s in run.streams
    ]
    header = ["torch, fp32", "memory", "the cases", "GB/s at best", "median"]
    parts += ["## What the memory gives", table(header, streams, text=3)]
    for case in run.cases:
        parts += [f"## {case.title}: {_size(case)}", *_in_cache(case, run)]
        if case.results:
            parts += [_details(case, run)]
    parts += _profiles(run.profiles)
    return "\n\n".join(parts) + "\n"


def short(run: Run) -> str:
    """What the README has of a run: ratios, and percents of what the memory gives."""
    header = f"Ratio to `{run.baseline}` in the same run, and percent of {_stream(run)} by the bytes that a step has to move."
    parts = [header]
    for dtype in dict.fromkeys(case.dtype for case in run.cases):
        cases = [case for case in run.cases if case.dtype == dtype and case.results]
        rows = []
        for name in contender_names(cases, run.contenders):
            found = [case.of(name) for case in cases]
            if any(found):
                rows.append([name, *(NOTHING if each is None else f"{each.ratio:.2f} ({each.percent_of_stream:.0f} %)" for each in found)])
        parts.append(table([dtype, *(case.name for case in cases)], rows))
    return "\n\n".join([*parts, f"{summary(run.environment)} Commit {run.environment['commit']}."])


def _stream(run: Run) -> str:
    if not run.on_gpu:
        return "the fastest stream"
    copies = [stream for stream in run.streams if "copy_" in stream.operation]
    medians = " and ".join(f"{stream.median_gigabytes_per_second:.0f} GB/s {stream.when}" for stream in copies)
    return f"the bandwidth of a copy from device to device ({medians} the cases)"


def _verdicts(verdicts: Sequence[Verdict]) -> list[str]:
    if not verdicts:
        return []
    rows = []
    for each in verdicts:
        numbers = [
            NOTHING if value is None else f"{value:.{0 if each.unit == '%' and value >= 100 else 2}f} {each.unit}"
            for value in (each.measured, each.alone, each.graph)
        ]
        verdict = {True: "met", False: "MISSED", None: f"not measured: {each.reason}"}[each.met]
        rows.append([each.target, each.case, verdict, f"{each.bound} {each.unit}", *numbers])
    header = ["", "case", "verdict", "bound", "measured", "device alone", "as a CUDA graph"]
    return ["## Targets", table(header, rows, text=3)]


def _in_cache(case: CaseRecord, run: Run) -> list[str]:
    """How much of a case a GPU's cache may still have from the step before."""
    cache = run.environment.get("gpu_details", {}).get("l2_bytes")
    baseline = case.of(run.baseline)
    if not cache or baseline is None:
        return []
    held = baseline.held_bytes_per_element * case.elements
    fits = "it fits, and no bandwidth of the memory is measured" if held <= cache else f"{held / cache:.1f} times the L2 cache"
    return [f"{run.baseline} holds {held / 2**20:,.0f} MiB, {fits}."]


def _profiles(found: Sequence[Profile]) -> list[str]:
    """One profiled step of each."""
    parts = ["## What a step is made of"] if found else []
    for each in found:
        parts.append(f"### {each.contender}, {each.case}")
        if each.failure is not None:
            parts.append(f"No profile: {each.failure}")
            continue
        count = sum(kernel.count for kernel in each.kernels)
        parts.append(
            "Torch's profiler saw nothing on the device."
            if not each.kernels
            else f"Device: {count:g} kernels and copies, {each.kernels_milliseconds:.3f} ms in them, {each.span_milliseconds:.3f} ms from"
            f" the first to the last, in {each.gaps_milliseconds:.3f} ms of which none ran. Times are a profiler's, which slows the host."
        )
        parts += [_shares("on the device", each.kernels)] if each.kernels else []
        parts += [_shares("on the host, its own time", each.functions)] if each.functions else []
    return parts


def _shares(what: str, shares: Sequence[Share]) -> str:
    rows = [[f"`{share.name.replace('|', '/').replace('`', '')}`", f"{share.count:g}", f"{share.microseconds:.1f}"] for share in shares]
    return table([what, "times a step", "us in all"], rows)


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


def _details(case: CaseRecord, run: Run) -> str:
    header = ["", "state", "ms", "quartiles", "samples", "ratio", "quartiles", "bytes/element", "GB/s"]
    header += ["% of copy", "device alone, ms", "host, ms"] if run.on_gpu else ["% of stream"]
    rows = []
    for result in case.results:
        low, high = result.quartiles
        digits = 3 if run.on_gpu else 2
        row = [
            result.contender,
            result.state + ("" if result.shared_moments else " (its own)") + (" (writes to gradients)" if result.writes_gradients else ""),
            f"{result.milliseconds:.{digits}f}",
            f"{low:.{digits}f} - {high:.{digits}f}",
            str(result.samples),
            f"{result.ratio:.3f}",
            f"{result.ratio_quartiles[0]:.3f} - {result.ratio_quartiles[1]:.3f}",
            str(result.bytes_per_element),
            f"{result.gigabytes_per_second:.1f}",
            f"{result.percent_of_stream:.{digits - 2}f}",
        ]
        if run.on_gpu:
            row += [NOTHING if value is None else f"{value:.3f}" for value in (result.device_milliseconds, result.host_milliseconds)]
        rows.append(row)
    return table(header, rows, text=2)
