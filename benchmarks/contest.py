"""All contenders of a case: how they are made ready, timed beside each other, and what is told of them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from benchmarks import bandwidth
from benchmarks.cases import DTYPES, Case
from benchmarks.contenders import BASELINE, OURS, Contender
from benchmarks.devices import CPU, GIB, Device
from benchmarks.graphs import Refused
from benchmarks.records import CaseRecord, Missing, Result, Stream
from benchmarks.storage import (
    FLOAT32,
    HUGE_PAGES,
    ORDINARY,
    Pool,
    fill_grads,
    fill_params,
    make_params,
    notices_shared_moments,
    share_moments,
)
from benchmarks.timing import LEAST_ROUNDS, LEAST_SAMPLES, Entrant, interleave, keep_threads, quartiles

__all__ = ["BYTES_PER_ELEMENT", "Memory", "Prepared", "first_line", "percent", "prepare", "run_case", "takes_part", "unmeasured"]

WARM_UP = 2  # steps, after those that compile and allocate
BYTES_PER_ELEMENT = 60  # of all contenders of a case together, at most: what they share, their own moments, and what a step allocates


@dataclass(kw_only=True)
class Prepared:
    """A contender that has warmed up."""

    contender: Contender
    entrant: Entrant
    optimizer: torch.optim.Optimizer
    params: list[nn.Parameter]
    shared_moments: bool
    writes_gradients: bool


@dataclass(kw_only=True)
class Memory:
    """What contenders of a case share."""

    case: Case
    device: Device
    params: dict[str, list[nn.Parameter]] = field(default_factory=dict)  # by kind of storage
    moments: dict[tuple[bool, bool], Pool] = field(default_factory=dict)  # by whether they are this library's, and on huge pages

    def params_on(self, kind: str) -> list[nn.Parameter]:
        if kind not in self.params:
            self.params[kind] = make_params(kind, self.case.layout.shapes, DTYPES[self.case.dtype], self.device.place)
        return self.params[kind]


def takes_part(contender: Contender, case: Case, device: Device) -> bool:
    """Whether the contender is meant for the case."""
    return device.kind in contender.devices and case.dtype in contender.dtypes and (contender.few or not case.layout.few)


def run_case(
    case: Case,
    contenders: Sequence[Contender],
    device: Device,
    streams: list[Stream],
    deadline: float,  # of time.monotonic
    broken: dict[str, str],  # reasons of contenders that could not be made in an earlier case; added to
    remarks: list[str],  # added to
    *,
    least_rounds: int = LEAST_ROUNDS,
    refused: Refused | None = None,  # see `graphs.probe`
) -> CaseRecord:
    """Time all contenders that are meant for a case; the others, and those that fail, are recorded with the reason.

    Without the baseline there is nothing to compare, and everyone has a reason.
    """
    memory = Memory(case=case, device=device)
    threads = torch.get_num_threads()
    meant = [each for each in contenders if takes_part(each, case, device)]
    prepared: list[Prepared] = []
    missing: dict[str, str] = {}  # reasons
    lost = _too_large(case, device)
    device.reset_peak()
    for contender in meant:
        if lost is not None:
            break
        try:
            prepared.append(prepare(contender, memory, broken, refused or {}))
        except Exception as error:  # whatever it is: the others go on, and the report has the reason
            missing[contender.name] = first_line(error)
            print(f"  {contender.name}: {missing[contender.name]}", file=sys.stderr)
            lost = device.failure()
        if contender.name in missing and lost is None:  # not in the handler, where the error's frames hold the memory
            gc.collect()
            device.release()
        if contender.name == BASELINE and contender.name in missing:
            lost = f"{BASELINE} does not run in {case.title}, so that nothing can be compared: {missing[BASELINE]}"
        if remark := keep_threads(threads, contender.name):
            remarks.append(remark)
            print(f"  {remark}", file=sys.stderr)
    if lost is None:
        interleave([each.entrant for each in prepared], BASELINE, deadline, device, least_rounds=least_rounds)
    results = _results(prepared, case, device, streams)
    for each in prepared:
        if each.entrant.failure is not None:
            reason = f"when it was timed, after {len(each.entrant.samples)} samples: {first_line(each.entrant.failure)}"
            missing[each.contender.name] = reason
            remarks.append(f"{each.contender.name} failed in {case.title} {reason}")
            print(f"  {each.contender.name} failed {reason}", file=sys.stderr)
    measured = {result.contender for result in results}
    absent = {each: missing.get(each.name, lost or "no sample was taken") for each in meant if each.name not in measured}
    return _record(case, results, absent, device.peak_bytes() if results else None)


def _record(case: Case, results: list[Result], absent: Mapping[Contender, str], peak_bytes: int | None) -> CaseRecord:
    """Of a case, with the reason why a contender is absent."""
    return CaseRecord(
        name=case.layout.name,
        dtype=case.dtype,
        tensors=len(case.layout.shapes),
        elements=case.layout.elements,
        same_elements=case.layout.same_elements,
        results=results,
        missing=[Missing(contender=each.name, library=each.library, reason=reason) for each, reason in absent.items()],
        peak_bytes=peak_bytes,
    )


def _too_large(case: Case, device: Device) -> str | None:
    """Why the device cannot have the case."""
    free, wanted = device.free_bytes(), BYTES_PER_ELEMENT * case.layout.elements
    if free is None or free >= wanted:
        return None
    return f"left out: all contenders together take up to {wanted / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free"


def prepare(contender: Contender, memory: Memory, broken: dict[str, str], refused: Refused) -> Prepared:
    """Make the optimizer, let it compile and allocate, and replace its moments by those that similar contenders have.

    Raises:
        ValueError: it is left out of this case.
        Exception: whatever it raises.
    """
    on_cpu, elements = memory.device.kind == CPU, memory.case.layout.elements
    if on_cpu and contender.most_elements is not None and elements > contender.most_elements:
        raise ValueError(f"left out above {contender.most_elements / 2**20:.0f}M elements, where it takes seconds")
    if (contender.name, memory.case.dtype) in refused:
        raise ValueError(refused[contender.name, memory.case.dtype])
    if contender.name in broken:
        raise ImportError(broken[contender.name])
    params = memory.params_on(contender.storage)
    try:
        optimizer = contender.make(params)
    except Exception as error:
        broken[contender.name] = first_line(error)
        raise
    grad = _some_of(params[0].grad).clone()
    optimizer.step()
    writes_gradients = not torch.equal(_some_of(params[0].grad), grad)
    restore = partial(fill_grads, params) if writes_gradients else None
    if restore:
        restore()
    pool = memory.moments.setdefault((contender.library == OURS, contender.storage == HUGE_PAGES), {})
    share_moments(optimizer, params, pool)
    shared = notices_shared_moments(optimizer, params[0])
    if not shared:
        optimizer = contender.make(params)
        optimizer.step()
    step: Callable[[], object] = optimizer.step
    if contender.graphed:
        step = memory.device.captured(step)
        if not notices_shared_moments(optimizer, params[0], step):
            raise RuntimeError("a replay of its graph does not step")
    warm = min(memory.device.time(step, 1).seconds for _ in range(WARM_UP))
    if not all(bool(_some_of(param).isfinite().all()) for param in params):
        fill_params(params)  # which others step, too, with these moments
        for moment in pool.values():
            moment.zero_()
        raise FloatingPointError("its parameters are not finite")
    if restore:
        restore()
    return Prepared(
        contender=contender,
        entrant=Entrant(name=contender.name, step=step, warm=warm, restore=restore),
        optimizer=optimizer,
        params=params,
        shared_moments=shared,
        writes_gradients=writes_gradients,
    )


def _some_of(tensor: torch.Tensor | None) -> torch.Tensor:
    """The first elements: what a step does, it does to all."""
    assert tensor is not None, "parameters are made with gradients"
    return tensor.detach().view(-1)[:1000]


def _results(prepared: Sequence[Prepared], case: Case, device: Device, streams: list[Stream]) -> list[Result]:
    """Of those with samples; who failed needs enough of them."""
    baseline = next((each.entrant for each in prepared if each.contender.name == BASELINE), None)
    if baseline is None:
        return []
    found = []
    for each in prepared:
        rounds = [number for number in each.entrant.samples if number in baseline.samples]
        if rounds and (each.entrant.failure is None or len(rounds) >= LEAST_SAMPLES):
            found.append(_result(each, rounds, baseline, case, device, streams))
    return found


def _result(prepared: Prepared, rounds: Sequence[int], baseline: Entrant, case: Case, device: Device, streams: list[Stream]) -> Result:
    contender, entrant = prepared.contender, prepared.entrant
    low, median, high = quartiles([entrant.samples[number] for number in rounds])
    ratio_low, ratio, ratio_high = quartiles([entrant.samples[number] / baseline.samples[number] for number in rounds])
    state, size, held = _traffic(prepared)
    rate = size * case.layout.elements / median / 1e9
    return Result(
        contender=contender.name,
        library=contender.library,
        algorithm=contender.algorithm,
        storage=contender.storage,
        state=state,
        shared_moments=prepared.shared_moments,
        writes_gradients=prepared.writes_gradients,
        samples=len(rounds),
        milliseconds=median * 1e3,
        quartiles=(low * 1e3, high * 1e3),
        ratio=ratio,
        ratio_quartiles=(ratio_low, ratio_high),
        bytes_per_element=size,
        gigabytes_per_second=rate,
        percent_of_stream=percent(rate, contender.storage, device, streams),
        held_bytes_per_element=held,
        host_milliseconds=1e3 * quartiles(entrant.of_host)[1] if entrant.of_host else None,
        device_milliseconds=1e3 * quartiles(entrant.alone)[1] if entrant.alone else None,
    )


def percent(rate: float, storage: str, device: Device, streams: list[Stream]) -> float:
    kind = ORDINARY if storage == FLOAT32 else storage
    return 100 * rate / bandwidth.reference(streams, kind, device.kind)


def _traffic(prepared: Prepared) -> tuple[str, int, int]:
    """(names and dtypes of the state's arrays, bytes per element that a step has to read and write, and that are held).

    Parameter and state are read and written, the gradient is read. StableAdamW needs a sum over gradient and second moment before it
    writes anything, so it reads these two once more.
    """
    param = prepared.params[0]
    assert param.grad is not None, "made with one"
    state = prepared.optimizer.state[param]
    arrays = {name: value for name, value in state.items() if isinstance(value, torch.Tensor) and value.shape == param.shape}
    names = {dtype: name for name, dtype in DTYPES.items()}
    written = [param, *arrays.values()]
    held = sum(tensor.element_size() for tensor in written) + param.grad.element_size()
    size = 2 * held - param.grad.element_size()
    if prepared.contender.algorithm == "StableAdamW":
        size += param.grad.element_size() + arrays["exp_avg_sq"].element_size()
    return ", ".join(f"{name} {names.get(value.dtype, value.dtype)}" for name, value in arrays.items()), size, held


def first_line(error: Exception) -> str:
    """What to say of an error, and of its cause."""
    cause = f" ({first_line(error.__cause__)})" if isinstance(error.__cause__, Exception) else ""
    text = (str(error).strip() or "no message").splitlines()[0]
    kind = "" if isinstance(error, (ImportError, ValueError)) else f"{type(error).__name__}: "
    return f"{kind}{text}{cause}"[:300]


def unmeasured(case: Case, contenders: Sequence[Contender], device: Device, reason: str) -> CaseRecord:
    return _record(case, [], {each: reason for each in contenders if takes_part(each, case, device)}, None)
