"""One step of every optimizer on the same parameters, side by side in one process: `python -m benchmarks.step`.

Contenders take turns in rounds, and what is compared is each one's time with the baseline's in the same round. Gradients stay as they are
and are nowhere zero. See README.md here.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import bandwidth, figure, graphs, profiles, report, targets
from benchmarks.cases import DTYPES, LAYOUTS, Case, select
from benchmarks.contenders import BASELINE, CONTENDERS, OURS, Contender
from benchmarks.contest import Memory, first_line, percent, prepare, run_case, unmeasured
from benchmarks.devices import CPU, CUDA, GIB, Device, pick
from benchmarks.environment import describe, summary
from benchmarks.graphs import Refused
from benchmarks.records import CaseRecord, Profile, Run, Stream, from_json
from benchmarks.storage import HUGE_PAGES, ORDINARY
from benchmarks.timing import LEAST_ROUNDS

__all__ = ["main", "run"]

RESULTS = Path(__file__).parent / "results"
SECONDS, QUICK_SECONDS = {CPU: 12 * 60, CUDA: 5 * 60}, 20  # of a whole run, of which each case gets its share
PROFILE_SECONDS = 60  # beyond which no further step is looked into
QUICK_ROUNDS = 3
BUSY = 0.25  # load per core: what is measured then is the others, too
# In a tensor, beyond any cache: 256 MiB, and 1 GiB where the cache has 60 MiB and a copy takes half a millisecond.
STREAM_ELEMENTS = {CPU: 64 * 2**20, CUDA: 256 * 2**20}


def run(
    cases: Sequence[Case],
    contenders: Sequence[Contender],
    device: Device,
    seconds: float,
    *,
    least_rounds: int = LEAST_ROUNDS,
    stream_elements: int | None = None,  # None: as many as the kind of device needs
    refused: Refused | None = None,  # see `graphs.probe`
    measured: Callable[[Run], object] = lambda record: None,  # is told after each case and before profiles, so that nothing is lost
) -> Run:
    """Measure the memory, then the cases one after the other, each with an equal share of the time that is left.

    The largest case is the last: what may go wrong there takes nothing else along. On a GPU the memory is measured again after the cases,
    targets are judged, and then a step of the baseline and of each contender of this library is looked into.

    Raises:
        RuntimeError: nothing was measured.
    """
    end = time.monotonic() + seconds
    environment = describe(device.place, "benchmarks.step") | device.describe()
    print(summary(environment), file=sys.stderr)
    numel = stream_elements or STREAM_ELEMENTS[device.kind]
    streams = bandwidth.measure(ORDINARY, numel, device)
    if any(contender.storage == HUGE_PAGES and device.kind in contender.devices for contender in contenders):
        try:
            streams += bandwidth.measure(HUGE_PAGES, numel, device)
        except ImportError as error:
            print(f"huge pages: {error}", file=sys.stderr)
    record = Run(environment=environment, baseline=BASELINE, contenders=[each.name for each in contenders], streams=streams)
    if (environment["load_average"] or 0.0) > BUSY * environment["cores"]:
        record.remarks.append(f"the machine was busy before: load average {environment['load_average']:.1f}, {environment['cores']} cores")
    lost = _measure(record, cases, contenders, device, end, least_rounds=least_rounds, refused=refused or {}, measured=measured)
    if not any(case.results for case in record.cases):
        raise RuntimeError(f"nothing was measured: {[each.reason for case in record.cases for each in case.missing]}")
    if device.kind != CUDA:
        return record
    if lost is None:
        _let_go(device)
        record.streams.extend(bandwidth.measure(ORDINARY, numel, device, when="after"))
        record.cases[:] = [_with_percents(case, device, record.streams) for case in record.cases]
    record.verdicts[:] = targets.judge(record)
    measured(record)
    if lost is None:
        record.profiles.extend(_profiles(cases, contenders, device, record))
    return record


def _measure(
    record: Run,  # cases and remarks are added to
    cases: Sequence[Case],
    contenders: Sequence[Contender],
    device: Device,
    end: float,  # of time.monotonic
    *,
    least_rounds: int,
    refused: Refused,
    measured: Callable[[Run], object],
) -> str | None:
    """Measure the cases, the largest last.

    Returns:
        Why the device could no longer be used, or None.
    """
    broken: dict[str, str] = {}
    found: dict[str, CaseRecord] = {}
    lost: str | None = None
    for index, case in enumerate(sorted(cases, key=lambda case: case.layout.elements)):
        begin = time.monotonic()
        deadline = begin + max(0.0, end - begin) / (len(cases) - index)
        print(f"{case.title}: tensors {len(case.layout.shapes):,}, elements {case.layout.elements:,}", file=sys.stderr, flush=True)
        if lost is None:
            _let_go(device)
            found[case.title] = run_case(
                case, contenders, device, record.streams, deadline, broken, record.remarks, least_rounds=least_rounds, refused=refused
            )
            if (lost := device.failure()) is not None:
                lost = f"in {case.title} {lost}; measure the other cases by another run, with --cases"
                record.remarks.append(lost)
        else:
            found[case.title] = unmeasured(case, contenders, device, lost)
        for result in found[case.title].results:
            print(f"  {result.contender:42} {result.milliseconds:9.3f} ms  {result.ratio:6.3f}  ({result.samples})", file=sys.stderr)
        peak = (found[case.title].peak_bytes or 0) / GIB
        print(f"  {time.monotonic() - begin:.0f} s, {peak:.1f} GiB of memory at most", file=sys.stderr, flush=True)
        record.cases[:] = [found[each.title] for each in cases if each.title in found]
        measured(record)
    return lost


def _let_go(device: Device) -> None:
    """Of the last case's memory."""
    gc.collect()
    device.release()


def _with_percents(case: CaseRecord, device: Device, streams: list[Stream]) -> CaseRecord:
    """The same with percents of what the streams gave in all of the run."""
    results = [replace(each, percent_of_stream=percent(each.gigabytes_per_second, each.storage, device, streams)) for each in case.results]
    return replace(case, results=results)


def _profiles(cases: Sequence[Case], contenders: Sequence[Contender], device: Device, record: Run) -> list[Profile]:
    """Of the baseline and of this library, where they were measured."""
    found: list[Profile] = []
    end = time.monotonic() + PROFILE_SECONDS
    for case, measured in zip(cases, record.cases, strict=True):
        memory = Memory(case=case, device=device)
        _let_go(device)
        for contender in contenders:
            wanted = (contender.library == OURS or contender.name == BASELINE) and not contender.graphed
            if wanted and measured.of(contender.name) is not None:
                found.append(_profile(contender, memory, end))
    return found


def _profile(contender: Contender, memory: Memory, end: float) -> Profile:
    """Of one of them, of whom nothing is left afterwards."""
    case = memory.case.title
    if time.monotonic() > end:
        return Profile(case=case, contender=contender.name, failure=f"left out after {PROFILE_SECONDS} s")
    try:
        step = prepare(contender, memory, {}, {}).entrant.step
        return profiles.profile(case, contender.name, step, memory.device)
    except Exception as error:  # the figures are there all the same
        return Profile(case=case, contender=contender.name, failure=first_line(error))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description="Times one step of every optimizer, side by side.")
    parser.add_argument("--device", choices=(CPU, CUDA), help="default: cuda if there is a GPU")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help=f"some of {', '.join(layout.name for layout in LAYOUTS)}")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), help="of parameters and gradients; default: all")
    parser.add_argument("--contenders", nargs="+", metavar="PART", help="only those with one of these in their name, and the baseline")
    times = ", ".join(f"{seconds} on {kind}" for kind, seconds in SECONDS.items())
    parser.add_argument("--seconds", type=float, help=f"for all cases; default {times}, or {QUICK_SECONDS} with --quick")
    parser.add_argument("--quick", action="store_true", help="a smoke run: small cases and few rounds")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; default: %(default)s")
    parser.add_argument("--table", type=Path, metavar="JSON", help="measure nothing: print the README's table of a run that was written")
    parser.add_argument("--figure", type=Path, metavar="JSON", help="measure nothing: draw the figure of a run that was written, beside it")
    options = parser.parse_args(arguments)
    if options.table:
        print(report.short(_read(options.table)))
    if options.figure:
        figure.draw(options.figure.with_suffix(".png"), _read(options.figure))
    if options.table or options.figure:
        return
    try:
        device = pick(options.device)
        cases = select(options.cases, options.dtypes, device=device.kind, quick=options.quick)
    except ValueError as error:
        parser.error(str(error))
    wanted = options.contenders
    contenders = [each for each in CONTENDERS if not wanted or each.name == BASELINE or any(part in each.name for part in wanted)]
    stem = f"step_{device.kind}"
    elements = STREAM_ELEMENTS[device.kind]
    record = run(
        cases,
        contenders,
        device,
        options.seconds or (QUICK_SECONDS if options.quick else SECONDS[device.kind]),
        least_rounds=QUICK_ROUNDS if options.quick else LEAST_ROUNDS,
        stream_elements=elements // 4 if options.quick else elements,
        refused=graphs.probe(contenders, list(dict.fromkeys(case.dtype for case in cases))) if device.kind == CUDA else {},
        measured=lambda record: report.write(options.output, stem, record, report.markdown(record)),
    )
    text = report.markdown(record)
    report.write(options.output, stem, record, text)
    print(text)
    print(f"written to {options.output / stem}.json and .md", file=sys.stderr)
    try:
        figure.draw(options.output / f"{stem}.png", record)
        print(f"drawn to {options.output / stem}.png", file=sys.stderr)
    except ImportError as error:
        later = f"python -m benchmarks.step --figure {options.output / stem}.json"
        print(f"no figure: {error}; where matplotlib is installed, `{later}` draws it", file=sys.stderr)


def _read(path: Path) -> Run:
    return from_json(json.loads(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
