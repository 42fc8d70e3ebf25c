"""One step of every optimizer on the same parameters, side by side in one process: `python -m benchmarks.step`.

Contenders take turns in rounds, and what is compared is each one's time with the baseline's in the same round. Gradients stay as they are
and are nowhere zero. See README.md here.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks import bandwidth, figure, report
from benchmarks.cases import DTYPES, LAYOUTS, Case, select
from benchmarks.contenders import BASELINE, CONTENDERS, OURS, Contender
from benchmarks.environment import describe, pick_device, summary
from benchmarks.records import CaseRecord, Missing, Result, Run, Stream
from benchmarks.storage import FLOAT32, HUGE_PAGES, ORDINARY, Pool, fill_grads, make_params, notices_shared_moments, share_moments
from benchmarks.timing import LEAST_ROUNDS, Entrant, interleave, keep_threads, quartiles, seconds_of

__all__ = ["main", "run", "run_case"]

RESULTS = Path(__file__).parent / "results"
SECONDS, QUICK_SECONDS = 12 * 60, 20  # of a whole run, of which each case gets its share
QUICK_ROUNDS = 3
BUSY = 0.25  # load per core: what is measured then is the others, too
WARM_UP = 2  # steps, after those that compile and allocate
STREAM_ELEMENTS = 64 * 2**20  # 256 MiB in a tensor, beyond any cache


@dataclass(kw_only=True)
class _Prepared:
    """A contender that has warmed up."""

    contender: Contender
    entrant: Entrant
    optimizer: torch.optim.Optimizer
    params: list[nn.Parameter]
    shared_moments: bool
    writes_gradients: bool


@dataclass(kw_only=True)
class _Memory:
    """What contenders of a case share."""

    case: Case
    device: torch.device
    params: dict[str, list[nn.Parameter]] = field(default_factory=dict)  # by kind of storage
    moments: dict[tuple[bool, bool], Pool] = field(default_factory=dict)  # by whether they are this library's, and on huge pages

    def params_on(self, kind: str) -> list[nn.Parameter]:
        if kind not in self.params:
            self.params[kind] = make_params(kind, self.case.layout.shapes, DTYPES[self.case.dtype], self.device)
        return self.params[kind]


def takes_part(contender: Contender, case: Case, device: torch.device) -> bool:
    """Whether the contender is meant for the case."""
    return device.type in contender.devices and case.dtype in contender.dtypes and (contender.few or not case.layout.few)


def run_case(
    case: Case,
    contenders: Sequence[Contender],
    device: torch.device,
    streams: list[Stream],
    deadline: float,  # of time.monotonic
    broken: dict[str, str],  # reasons of contenders that could not be made in an earlier case; added to
    remarks: list[str],  # added to
    *,
    least_rounds: int = LEAST_ROUNDS,
) -> CaseRecord:
    """Time all contenders that are meant for a case; the others, and those that fail, are recorded with the reason."""
    memory = _Memory(case=case, device=device)
    threads = torch.get_num_threads()
    prepared: list[_Prepared] = []
    missing: list[Missing] = []
    for contender in contenders:
        if not takes_part(contender, case, device):
            continue
        try:
            prepared.append(_prepare(contender, memory, broken))
        except Exception as error:  # whatever it is: the others go on, and the report has the reason
            missing.append(Missing(contender=contender.name, library=contender.library, reason=_first_line(error)))
            print(f"  {contender.name}: {missing[-1].reason}", file=sys.stderr)
        if remark := keep_threads(threads, contender.name):
            remarks.append(remark)
            print(f"  {remark}", file=sys.stderr)
    if not any(each.contender.name == BASELINE for each in prepared):
        raise RuntimeError(f"{BASELINE} does not run in {case.title}: {missing}; nothing can be compared")
    interleave([each.entrant for each in prepared], BASELINE, deadline, device, least_rounds=least_rounds)
    baseline = next(each.entrant for each in prepared if each.contender.name == BASELINE)
    results = [_result(each, baseline, case, streams) for each in prepared]
    return CaseRecord(
        name=case.layout.name,
        dtype=case.dtype,
        tensors=len(case.layout.shapes),
        elements=case.layout.elements,
        same_elements=case.layout.same_elements,
        results=results,
        missing=missing,
    )


def _prepare(contender: Contender, memory: _Memory, broken: dict[str, str]) -> _Prepared:
    """Make the optimizer, let it compile and allocate, and replace its moments by those that similar contenders have.

    Raises:
        ValueError: it is left out of this case.
        Exception: whatever it raises.
    """
    if contender.most_elements is not None and memory.case.layout.elements > contender.most_elements:
        raise ValueError(f"left out above {contender.most_elements / 2**20:.0f}M elements, where it takes seconds")
    if contender.name in broken:
        raise ImportError(broken[contender.name])
    params = memory.params_on(contender.storage)
    try:
        optimizer = contender.make(params)
    except Exception as error:
        broken[contender.name] = _first_line(error)
        raise
    grad = _some_of(params[0].grad).clone()
    optimizer.step()
    writes_gradients = not torch.equal(_some_of(params[0].grad), grad)
    restore = partial(fill_grads, params) if writes_gradients else None
    if restore:
        restore()
    share_moments(optimizer, params, memory.moments.setdefault((contender.library == OURS, contender.storage == HUGE_PAGES), {}))
    shared = notices_shared_moments(optimizer, params[0])
    if not shared:
        optimizer = contender.make(params)
        optimizer.step()
    warm = min(seconds_of(optimizer.step, 1, memory.device) for _ in range(WARM_UP))
    if not all(bool(_some_of(param).isfinite().all()) for param in params):
        raise FloatingPointError("its parameters are not finite")
    if restore:
        restore()
    entrant = Entrant(name=contender.name, step=optimizer.step, warm=warm, restore=restore)
    return _Prepared(
        contender=contender,
        entrant=entrant,
        optimizer=optimizer,
        params=params,
        shared_moments=shared,
        writes_gradients=writes_gradients,
    )


def _some_of(tensor: torch.Tensor | None) -> torch.Tensor:
    """The first elements: what a step does, it does to all."""
    assert tensor is not None, "parameters are made with gradients"
    return tensor.detach().view(-1)[:1000]


def _result(prepared: _Prepared, baseline: Entrant, case: Case, streams: list[Stream]) -> Result:
    contender, samples = prepared.contender, prepared.entrant.samples
    low, median, high = quartiles(list(samples.values()))
    ratio_low, ratio, ratio_high = quartiles([seconds / baseline.samples[number] for number, seconds in samples.items()])
    state, size = _traffic(prepared)
    rate = size * case.layout.elements / median / 1e9
    kind = ORDINARY if contender.storage == FLOAT32 else contender.storage
    return Result(
        contender=contender.name,
        library=contender.library,
        algorithm=contender.algorithm,
        storage=contender.storage,
        state=state,
        shared_moments=prepared.shared_moments,
        writes_gradients=prepared.writes_gradients,
        samples=len(samples),
        milliseconds=median * 1e3,
        quartiles=(low * 1e3, high * 1e3),
        ratio=ratio,
        ratio_quartiles=(ratio_low, ratio_high),
        bytes_per_element=size,
        gigabytes_per_second=rate,
        percent_of_stream=100 * rate / bandwidth.fastest(streams, kind),
    )


def _traffic(prepared: _Prepared) -> tuple[str, int]:
    """(names and dtypes of the state's arrays, bytes per element that a step has to read and write).

    Parameter and state are read and written, the gradient is read. StableAdamW needs a sum over gradient and second moment before it
    writes anything, so it reads these two once more.
    """
    param = prepared.params[0]
    assert param.grad is not None, "made with one"
    state = prepared.optimizer.state[param]
    arrays = {name: value for name, value in state.items() if isinstance(value, torch.Tensor) and value.shape == param.shape}
    names = {dtype: name for name, dtype in DTYPES.items()}
    written = [param, *arrays.values()]
    size = 2 * sum(tensor.element_size() for tensor in written) + param.grad.element_size()
    if prepared.contender.algorithm == "StableAdamW":
        size += param.grad.element_size() + arrays["exp_avg_sq"].element_size()
    return ", ".join(f"{name} {names.get(value.dtype, value.dtype)}" for name, value in arrays.items()), size


def _first_line(error: Exception) -> str:
    """What to say of an error, and of its cause."""
    cause = f" ({_first_line(error.__cause__)})" if isinstance(error.__cause__, Exception) else ""
    text = (str(error).strip() or "no message").splitlines()[0]
    kind = "" if isinstance(error, (ImportError, ValueError)) else f"{type(error).__name__}: "
    return f"{kind}{text}{cause}"[:300]


def run(
    cases: Sequence[Case],
    contenders: Sequence[Contender],
    device: torch.device,
    seconds: float,
    *,
    least_rounds: int = LEAST_ROUNDS,
    stream_elements: int = STREAM_ELEMENTS,
) -> Run:
    """Measure the memory, then the cases one after the other, each with an equal share of the time that is left."""
    end = time.monotonic() + seconds
    print(summary(environment := describe(device, "benchmarks.step")), file=sys.stderr)
    streams = bandwidth.measure(ORDINARY, stream_elements, device)
    if any(contender.storage == HUGE_PAGES and device.type in contender.devices for contender in contenders):
        try:
            streams += bandwidth.measure(HUGE_PAGES, stream_elements, device)
        except ImportError as error:
            print(f"huge pages: {error}", file=sys.stderr)
    record = Run(environment=environment, baseline=BASELINE, contenders=[each.name for each in contenders], streams=streams)
    if device.type == "cpu" and (environment["load_average"] or 0.0) > BUSY * environment["cores"]:
        record.remarks.append(f"the machine was busy before: load average {environment['load_average']:.1f}, {environment['cores']} cores")
    broken: dict[str, str] = {}
    for index, case in enumerate(cases):
        gc.collect()  # the last case's memory
        begin = time.monotonic()
        deadline = begin + max(0.0, end - begin) / (len(cases) - index)
        print(f"{case.title}: tensors {len(case.layout.shapes):,}, elements {case.layout.elements:,}", file=sys.stderr, flush=True)
        record.cases.append(run_case(case, contenders, device, streams, deadline, broken, record.remarks, least_rounds=least_rounds))
        for result in record.cases[-1].results:
            print(f"  {result.contender:38} {result.milliseconds:9.2f} ms  {result.ratio:6.2f}  ({result.samples})", file=sys.stderr)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB: Linux counts in KiB
        print(f"  {time.monotonic() - begin:.0f} s, {peak:.1f} GiB of memory at most", file=sys.stderr, flush=True)
    return record


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description="Times one step of every optimizer, side by side.")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help=f"some of {', '.join(layout.name for layout in LAYOUTS)}")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), help="of parameters and gradients; default: all")
    parser.add_argument("--contenders", nargs="+", metavar="PART", help="only those with one of these in their name, and the baseline")
    parser.add_argument("--seconds", type=float, help=f"for everything; default {SECONDS}, or {QUICK_SECONDS} with --quick")
    parser.add_argument("--quick", action="store_true", help="a smoke run: small cases and few rounds")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        device = pick_device(options.device)
        cases = select(options.cases, options.dtypes, quick=options.quick)
    except ValueError as error:
        parser.error(str(error))
    wanted = options.contenders
    contenders = [each for each in CONTENDERS if not wanted or each.name == BASELINE or any(part in each.name for part in wanted)]
    record = run(
        cases,
        contenders,
        device,
        options.seconds or (QUICK_SECONDS if options.quick else SECONDS),
        least_rounds=QUICK_ROUNDS if options.quick else LEAST_ROUNDS,
        stream_elements=STREAM_ELEMENTS // 4 if options.quick else STREAM_ELEMENTS,
    )
    stem = f"step_{device.type}"
    text = report.markdown(record)
    report.write(options.output, stem, record, text)
    figure.draw(options.output / f"{stem}.png", record)
    print(text)
    print(f"written to {options.output / stem}.json, .md and .png", file=sys.stderr)


if __name__ == "__main__":
    main()
