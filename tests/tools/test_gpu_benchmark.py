"""`make gpu-bench` without a GPU: all that it does but for the calls to one, with tensors of a few elements.

This library's contenders run eagerly, and one case in Triton's interpreter, which takes a tenth of a second for a step. No test looks at a
time.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import re
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import bandwidth, contest, figure, graphs, profiles, report, step
from benchmarks.bandwidth import COPY
from benchmarks.cases import LAYOUTS, LLAMA3_8B, Case, Layout, select, shards
from benchmarks.contenders import BASELINE, CONTENDERS, GRAPH, OURS, Contender, by_name
from benchmarks.contest import BYTES_PER_ELEMENT, Memory, prepare
from benchmarks.devices import CPU, CUDA, Cpu, Cuda, Device, pick
from benchmarks.records import CaseRecord, Result, Run, Stream, from_json
from benchmarks.storage import ORDINARY
from benchmarks.targets import ADAMW, STABLE_ADAMW, TARGETS, judge
from benchmarks.timing import Entrant, Timed, interleave

triton = pytest.importorskip("triton", reason="the triton package is not installed")

ON_GPU = [contender for contender in CONTENDERS if CUDA in contender.devices]
EAGERLY = [dataclasses.replace(each, make=partial(each.make, backend="eager")) if each.library == OURS else each for each in ON_GPU]
FLAT = Layout(name="flat", shapes=((100,),))
FP32 = Case(layout=FLAT, dtype="fp32")
PREPARED = 8  # steps of a contender before it is timed beside others


class HostEvent:
    """An event of the host."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        """It has happened."""

    def elapsed_time(self, end: HostEvent) -> float:
        return 1e3 * (end.time - self.time) + 1e-6


class NoGpu(Cuda):
    """A GPU whose tensors are on the CPU, and which notes what it is asked to do."""

    place = torch.device("cpu")

    def __init__(self, *, free: int = 2**40, error: str | None = None) -> None:
        super().__init__()
        self.free = free
        self.error = error
        self.calls: list[str] = []

    def describe(self) -> dict[str, Any]:
        return {"device": CUDA, "gpu": "no GPU", "gpu_details": {"l2_bytes": 1000, "cuda": "0.0", "driver_version": "1"}}

    def event(self) -> HostEvent:
        self.calls.append("event")
        return HostEvent()

    def synchronize(self) -> None:
        self.calls.append("synchronize")
        if self.error:
            raise RuntimeError(self.error)

    def sleep(self, seconds: float) -> None:
        self.calls.append("sleep")
        assert seconds > 0

    def free_bytes(self) -> int:
        return self.free

    def reset_peak(self) -> None:
        self.calls.append("reset_peak")

    def peak_bytes(self) -> int:
        return 3 * 2**30

    def release(self) -> None:
        self.calls.append("release")

    def captured(self, step: Callable[[], object]) -> Callable[[], object]:
        return lambda: step()


@pytest.fixture(autouse=True, scope="module")
def awake() -> Iterator[None]:
    """What is not there need not be woken by copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bandwidth, "GPU_WARM_UP", 0.0)
        yield


def scaled_down(case: Case) -> Case:
    """Its first tensors, of a few elements each."""
    return dataclasses.replace(
        case, layout=dataclasses.replace(case.layout, shapes=tuple(tuple(min(n, 5) for n in shape) for shape in case.layout.shapes[:3]))
    )


def measure(contenders: list[Contender], device: NoGpu | None = None, cases: list[Case] | None = None, **options: Any) -> Run:
    return step.run(cases or [FP32], contenders, device or NoGpu(), seconds=0.0, least_rounds=3, stream_elements=1000, **options)


@pytest.fixture(scope="module")
def rehearsal() -> Run:
    """The cases and contenders of `make gpu-bench`."""
    return measure(
        EAGERLY, cases=[scaled_down(case) for case in select(None, None, device=CUDA)], refused={(BASELINE + GRAPH, "bf16"): "no"}
    )


def test_the_cases_of_a_gpu_are_those_of_its_targets(rehearsal: Run) -> None:
    titles = [f"{name} {dtype}" for dtype in ("fp32", "bf16") for name in ("16M", "256M", "1G", "GPT-2", "Llama-3-8B/64")]
    assert [case.title for case in rehearsal.cases] == titles
    assert {title for target in TARGETS for title in target.cases} <= set(titles)
    names = {contender.name for contender in ON_GPU}
    assert {name for target in TARGETS for name in (target.contender, target.contender + GRAPH, target.against)} - {"the copy"} <= names


def test_a_rank_of_64_has_its_part_of_llama_3_8b() -> None:
    assert len(LLAMA3_8B) == 291
    assert sum(math.prod(shape) for shape in LLAMA3_8B) == 8_030_261_248
    (layout,) = (layout for layout in LAYOUTS if layout.name == "Llama-3-8B/64")
    assert layout.elements * 64 == 8_030_261_248
    assert shards(((5, 3), (2,)), 2) == ((3, 3), (1,))


def test_everyone_is_measured_on_a_gpu_or_has_a_reason(rehearsal: Run) -> None:
    for case in rehearsal.cases:
        meant = {contender.name for contender in ON_GPU if case.dtype in contender.dtypes}
        reasons = {each.contender: each.reason for each in case.missing}
        assert {result.contender for result in case.results} | set(reasons) == meant
        assert all(name.startswith("optimi") or name == BASELINE + GRAPH for name in reasons), reasons
        assert case.peak_bytes == 3 * 2**30
        for result in case.results:
            numbers = (result.milliseconds, result.ratio, result.percent_of_stream, result.host_milliseconds, result.device_milliseconds)
            assert all(number is not None and math.isfinite(number) and number > 0 for number in numbers), result
            assert result.shared_moments
            assert not (result.writes_gradients and result.library == OURS)
    assert [each.reason for case in rehearsal.cases for each in case.missing if each.contender == BASELINE + GRAPH] == ["no"] * 5


def test_bytes_on_a_gpu_are_those_of_the_table_in_theory(rehearsal: Run) -> None:
    sizes = {(case.dtype, r.contender): r.bytes_per_element for case in rehearsal.cases for r in case.results}
    assert (sizes["fp32", ADAMW], sizes["fp32", STABLE_ADAMW]) == (28, 36)
    variants = ("", ", no Kahan", ", bf16 moments", ", bf16 moments, no Kahan")
    assert [sizes["bf16", ADAMW + variant] for variant in variants] == [26, 22, 18, 14]
    assert [sizes["bf16", STABLE_ADAMW + variant] for variant in variants] == [32, 28, 22, 18]
    assert [sizes["bf16", name] for name in (BASELINE, "torch AdamW fused, fp32 copy")] == [14, 28]


def test_the_copy_is_measured_before_and_after_and_is_what_percents_are_of(rehearsal: Run) -> None:
    copies = [stream for stream in rehearsal.streams if "copy_" in stream.operation]
    assert [stream.when for stream in copies] == ["before", "after"]
    best = max(stream.median_gigabytes_per_second for stream in copies)
    for case in rehearsal.cases:
        for result in case.results:
            assert result.percent_of_stream == pytest.approx(100 * result.gigabytes_per_second / best)


@pytest.mark.parametrize(("device", "calls"), [(NoGpu(), 8), (Cpu(), 1)])
def test_several_copies_in_a_row_are_timed_on_a_gpu(device: Device, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def noted(step: Callable[[], object], calls: int) -> Timed:
        asked.append(calls)
        return Timed(seconds=1.0)

    monkeypatch.setattr(device, "time", noted)
    bandwidth.measure(ORDINARY, 10, device)
    assert set(asked) == {calls}


def test_ours_and_the_baseline_are_profiled(rehearsal: Run) -> None:
    for case in rehearsal.cases:
        found = {each.contender: each for each in rehearsal.profiles if each.case == case.title}
        wanted = {r.contender for r in case.results if (r.library == OURS or r.contender == BASELINE) and not r.contender.endswith(GRAPH)}
        assert set(found) == wanted
        assert all(each.failure is None and each.functions for each in found.values()), found


def test_targets_are_judged_and_written_before_profiles() -> None:
    """A profiler may take the process along."""
    written: list[tuple[int, int, int]] = []
    run = measure([by_name(BASELINE)], measured=lambda run: written.append((len(run.streams), len(run.verdicts), len(run.profiles))))
    assert written == [(3, 0, 0), (6, len(run.verdicts), 0)]
    assert run.verdicts
    assert run.profiles


def test_a_gpus_report_has_a_row_for_everything(rehearsal: Run, tmp_path: Path) -> None:
    text = report.markdown(rehearsal)
    report.write(tmp_path, "step_cuda", rehearsal, text)
    figure.draw(tmp_path / "step_cuda.png", rehearsal)
    assert (tmp_path / "step_cuda.png").read_bytes().startswith(b"\x89PNG")
    assert "no GPU" in text
    assert "CUDA 0.0, driver 1" in text
    for target in TARGETS:
        assert text.count(f"| {target.text} |") >= len(target.cases)
    assert f"### {ADAMW}, 16M fp32" in text
    assert "| before |" in text
    assert "| after |" in text
    assert text.count("times the L2 cache.") + text.count("it fits, and no bandwidth of the memory is measured.") == 10
    content = json.loads((tmp_path / "step_cuda.json").read_text())
    assert len(content["verdicts"]) == sum(len(target.cases) for target in TARGETS)
    short = report.short(from_json(content))
    assert short == report.short(rehearsal)
    assert f"| {STABLE_ADAMW} |" in short
    assert len(re.findall(r"\d\.\d\d \(\d+ %\)", short)) == sum(len(case.results) for case in rehearsal.cases)


def test_the_table_of_the_readme_is_printed_from_what_was_written(
    rehearsal: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report.write(tmp_path, "step_cuda", rehearsal, "")
    step.main(["--table", str(tmp_path / "step_cuda.json")])
    assert capsys.readouterr().out == report.short(rehearsal) + "\n"
    step.main(["--table", str(step.RESULTS / "step_cpu.json")])
    assert "| ours AdamW cpu |" in capsys.readouterr().out


def test_without_matplotlib_the_figure_is_drawn_later(
    rehearsal: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the JSON, which is there all the same."""
    monkeypatch.setattr(step, "run", lambda *arguments, **options: rehearsal)
    written = tmp_path / "step_cpu.json"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        step.main(["--device", CPU, "--output", str(tmp_path)])
    assert f"`python -m benchmarks.step --figure {written}` draws it" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_cpu.json", "step_cpu.md"]
    step.main(["--figure", str(written)])
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(
    triton.__version__.startswith("3.6."), reason="Triton 3.6 interprets with numpy < 2.4 only, which tests/unit/test_triton.py mends"
)
def test_ours_are_measured_with_tritons_kernels() -> None:
    names = (BASELINE, f"{ADAMW}, bf16 moments", STABLE_ADAMW)
    copy = Stream(operation=COPY, storage="ordinary", bytes_per_element=8, gigabytes_per_second=1.0, median_gigabytes_per_second=1.0)
    case = dataclasses.replace(FP32, dtype="bf16")
    with triton.knobs.runtime.scope(), np.errstate(all="ignore"):
        triton.knobs.runtime.interpret = True
        record = contest.run_case(case, [by_name(name) for name in names], NoGpu(), [copy], 0.0, {}, [], least_rounds=1)
    assert [result.contender for result in record.results] == list(names), record.missing
    assert [result.state for result in record.results[1:]] == [
        "exp_avg bf16, exp_avg_sq bf16, kahan_comp bf16",
        "exp_avg fp32, exp_avg_sq fp32, kahan_comp bf16",
    ]


def test_a_step_is_timed_behind_another_and_alone_behind_a_sleep() -> None:
    """Without waiting between the untimed step and the timed ones; gradients that it writes to are restored before each."""
    device = NoGpu()
    timed = device.time(lambda: device.calls.append("step"), 2)
    row = ["event", "event", "synchronize", "step", "step", "step"]
    assert device.calls == [*row, "event", "event", "synchronize", "sleep", "step"]
    assert min(timed.seconds, timed.host or 0.0, timed.alone or 0.0) > 0
    device.calls.clear()
    device.time(lambda: device.calls.append("step"), 1, restore=lambda: device.calls.append("restore"))
    assert [call for call in device.calls if call in ("step", "restore")] == ["restore", "step"] * 3


def test_the_hosts_time_has_no_waiting_for_the_step_before() -> None:
    """As StableAdamW waits at its beginning for the verdict of the step before, unless the device has been waited for."""
    device = NoGpu()

    def step() -> None:
        if device.calls[-1] not in ("synchronize", "sleep"):
            time.sleep(0.05)
        device.calls.append("step")

    timed = device.time(step, 2)
    assert timed.seconds >= 0.05 > (timed.host or 1.0)


def test_the_device_sleeps_by_the_fastest_clock_that_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has just woken up when it is asked for the first time."""
    now, slept = 0.0, []

    def sleep(cycles: int) -> None:
        nonlocal now
        slept.append(cycles)
        now += cycles / (2e9 if len(slept) > 4 else 3e8)

    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(Cuda, "event", lambda self: HostEvent())
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    device = Cuda()
    device.sleep(1.0)
    device.sleep(0.5)
    assert slept[-2:] == pytest.approx([2e9, 1e9], rel=1e-5)


def test_the_sleep_that_torch_keeps_private_is_there() -> None:
    assert callable(getattr(torch.cuda, "_sleep", None)), "benchmarks/devices.py lets the stream sleep by torch.cuda._sleep"


# --------------------------------------------------------------------------------------------------------------- what goes wrong


def out_of_memory(params: object) -> torch.optim.Optimizer:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB.\nSee documentation")


class FailsIn(torch.optim.AdamW):
    """Raises in a step, and may take the device along."""

    def __init__(self, params: list[nn.Parameter], *, at: int, device: NoGpu | None = None) -> None:
        super().__init__(params, lr=1e-4)
        self.left = at
        self.device = device

    def step(self, closure: None = None) -> None:
        self.left -= 1
        if self.left < 0:
            if self.device is not None:
                self.device.error = "CUDA error: an illegal memory access was encountered"
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        super().step()


def contender(name: str, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], **options: Any) -> Contender:
    return Contender(name=name, library="nobody", algorithm="AdamW", make=make, **options)


FOREACH = by_name("torch AdamW foreach")


def test_who_has_no_memory_is_left_out_and_the_others_go_on() -> None:
    device = NoGpu()
    (case,) = measure([by_name(BASELINE), contender("large", out_of_memory), FOREACH], device).cases
    assert [result.contender for result in case.results] == [BASELINE, FOREACH.name]
    assert [(each.contender, each.reason) for each in case.missing] == [
        ("large", "OutOfMemoryError: CUDA out of memory. Tried to allocate 4.00 GiB.")
    ]
    assert device.calls.count("release") >= 2


def test_a_case_that_is_too_large_is_left_out() -> None:
    large = Case(layout=Layout(name="large", shapes=((10_000,),)), dtype="fp32")
    run = measure([by_name(BASELINE), FOREACH], NoGpu(free=200 * BYTES_PER_ELEMENT), cases=[large, FP32])
    assert [bool(case.results) for case in run.cases] == [False, True]
    assert all("left out: all contenders together take up to" in each.reason for each in run.cases[0].missing)
    assert len(run.cases[0].missing) == 2
    with pytest.raises(RuntimeError, match="nothing was measured"):
        measure([by_name(BASELINE)], NoGpu(free=0))


def test_a_case_without_the_baseline_has_reasons() -> None:
    broken = dataclasses.replace(by_name(BASELINE), make=out_of_memory)
    record = contest.run_case(FP32, [broken, FOREACH], NoGpu(), [], 0.0, {}, [])
    assert not record.results
    assert [each.contender for each in record.missing] == [BASELINE, FOREACH.name]
    assert "so that nothing can be compared" in record.missing[1].reason


def test_who_fails_while_it_is_timed_is_told_and_the_others_go_on() -> None:
    run = measure([by_name(BASELINE), contender("late", lambda params: FailsIn(params, at=PREPARED)), FOREACH])
    (case,) = run.cases
    assert [result.contender for result in case.results] == [BASELINE, FOREACH.name]
    assert "when it was timed, after 0 samples: RuntimeError: CUDA error" in case.missing[0].reason
    assert any(remark.startswith("late failed in flat fp32") for remark in run.remarks)


@pytest.mark.parametrize("at", [0, PREPARED])
def test_after_a_gpu_is_lost_what_was_measured_is_kept(at: int) -> None:
    """Smaller cases are measured first; afterwards nothing is asked of the GPU."""
    device, written = NoGpu(), []
    small = Case(layout=Layout(name="small", shapes=((10,),)), dtype="fp32")
    last = Case(layout=Layout(name="last", shapes=((1000,),)), dtype="fp32")
    fails = contender("fails", lambda params: FailsIn(params, at=at if params[0].numel() == 100 else 1000, device=device))
    run = measure([by_name(BASELINE), fails], device, [last, FP32, small], measured=lambda run: written.append(len(run.cases)))
    assert [(case.name, bool(case.results)) for case in run.cases] == [("last", False), ("flat", False), ("small", True)]
    assert all("can no longer be used in this process (CUDA error" in each.reason for each in run.cases[0].missing)
    assert written == [1, 2, 3, 3]
    assert {stream.when for stream in run.streams} == {"before"}
    assert run.verdicts
    assert not run.profiles
    report.markdown(run)


def test_what_diverges_leaves_nothing_to_the_others() -> None:
    diverges = contender("diverges", lambda params: torch.optim.AdamW(params, lr=math.inf))
    (case,) = measure([by_name(BASELINE), diverges, FOREACH]).cases
    assert [result.contender for result in case.results] == [BASELINE, FOREACH.name]
    assert "not finite" in case.missing[0].reason


def test_without_the_baseline_nobody_is_timed_any_more() -> None:
    def fails() -> None:
        raise ValueError("no")

    baseline, other = Entrant(name=BASELINE, step=fails, warm=1e-6), Entrant(name="other", step=lambda: None, warm=1e-6)
    interleave([baseline, other], BASELINE, 0.0, Cpu(), least_rounds=9)
    assert isinstance(baseline.failure, ValueError)
    assert len(other.samples) <= 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_case_takes_no_more_memory_than_it_is_said_to(dtype: str) -> None:
    """Arrays of all contenders, and those of one more before it shares them. What a step allocates is known for a GPU only."""
    memory = Memory(case=Case(layout=FLAT, dtype=dtype), device=NoGpu())
    own = 0
    for each in EAGERLY:
        if dtype in each.dtypes and each.library != "optimi":
            prepared = prepare(each, memory, {}, {})
            own = max(own, sum(value.nbytes for value in prepared.optimizer.state[prepared.params[0]].values() if value.numel() > 1))
    shared = [tensor for pool in memory.moments.values() for tensor in pool.values()]
    inputs = [tensor for params in memory.params.values() for param in params for tensor in (param, param.grad)]
    assert sum(tensor.nbytes for tensor in [*shared, *inputs]) + own <= (BYTES_PER_ELEMENT - 12) * FLAT.elements


def test_a_case_leaves_no_memory_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when it was timed nor when it was profiled, whoever failed: each finds the parameters of those before it collected."""
    made: list[weakref.ref[nn.Parameter]] = []
    left: list[int] = []

    def noted(each: Contender) -> Contender:
        def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
            made.extend(weakref.ref(param) for param in params)
            return each.make(params)

        return dataclasses.replace(each, make=make)

    let_go = step._let_go

    def looks(device: NoGpu) -> None:
        let_go(device)
        left.append(sum(param() is not None for param in made))

    monkeypatch.setattr(step, "_let_go", looks)
    fails = [contender("late", lambda params: FailsIn(params, at=PREPARED)), contender("large", out_of_memory)]
    cases = [dataclasses.replace(FP32, dtype=dtype) for dtype in ("fp32", "bf16")]
    run = measure([noted(each) for each in (*EAGERLY, *fails)], cases=cases)
    gc.collect()
    left.append(sum(param() is not None for param in made))
    assert left == [0] * (2 + 1 + 2 + 1), "before each case, the second copy and each case's profiles, and in the end"
    assert len(made) > 2 * len(run.cases)
    assert run.profiles


# ----------------------------------------------------------------------------------------------------------------------- graphs


def test_a_capture_that_fails_fails_in_another_process() -> None:
    """Here that is for want of a GPU."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    two = [each for each in CONTENDERS if each.graphed][:2]
    refused = graphs.probe(two, ["fp32"])
    assert set(refused) == {(each.name, "fp32") for each in two}
    assert all("torch finds no GPU" in reason for reason in refused.values())


def test_answers_of_the_processes_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ends with the first that cannot be captured, or without an answer."""
    asked: list[list[tuple[str, str]]] = []
    answers: list[tuple[list[str | None], str]] = [([None, "no"], "ended"), ([], "crashed"), ([None], "ended")]

    def ask(pairs: list[tuple[str, str]], seconds: float) -> tuple[list[str | None], str]:
        asked.append(list(pairs))
        return answers[len(asked) - 1]

    monkeypatch.setattr(graphs, "_ask", ask)
    four = [contender(f"{number}{GRAPH}", out_of_memory) for number in range(4)]
    assert graphs.probe([*four, FOREACH], ["fp32"]) == {(four[1].name, "fp32"): "no", (four[2].name, "fp32"): "crashed"}
    assert [len(pairs) for pairs in asked] == [4, 2, 1]


def test_a_capture_that_hangs_costs_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process here answers for one pair, and then hangs in the next."""
    hangs = tmp_path / "hangs"
    hangs.write_text("#!/bin/sh\necho '{\"refused\": null}'\nexec sleep 60\n")
    hangs.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hangs))
    monkeypatch.setattr(graphs, "SECONDS", 1)
    five = [contender(f"{number}{GRAPH}", out_of_memory) for number in range(5)]
    hung = "a process that tried to capture it did not end within 1 s"
    assert graphs.probe(five[:4], ["fp32"]) == {(five[1].name, "fp32"): hung, (five[3].name, "fp32"): hung}
    monkeypatch.setattr(graphs, "SECONDS_OF_ALL", 1)
    refused = graphs.probe(five, ["fp32"])
    assert list(refused) == [(each.name, "fp32") for each in five[1:]]
    assert [reason.split(":")[0] for reason in refused.values()] == [hung, *["whether it can be captured was not tried"] * 3]


def test_a_graph_counts_only_if_its_replay_steps() -> None:
    device = NoGpu()
    assert graphs.try_capture(by_name(BASELINE + GRAPH), "fp32", device) is None or not torch.cuda.is_available()
    ours = dataclasses.replace(by_name(ADAMW + GRAPH), make=torch.optim.AdamW)
    assert graphs.try_capture(ours, "fp32", device) is None
    device.captured = lambda step: lambda: None  # type: ignore[method-assign]
    assert graphs.try_capture(ours, "fp32", device) == "a replay of its graph does not step"
    (case,) = measure([by_name(BASELINE), ours], device).cases
    assert [each.reason for each in case.missing] == ["RuntimeError: a replay of its graph does not step"]


# --------------------------------------------------------------------------------------------------------------------- profiles


def test_kernels_and_gaps_of_a_step() -> None:
    """Kernels may overlap."""
    events = [("b", 20.0, 30.0), ("a", 0.0, 4.0), ("a", 3.0, 5.0), ("c", 6.0, 25.0)]
    assert profiles.span_and_gaps(events) == (30.0, 1.0)
    assert [(share.name, share.count, share.microseconds) for share in profiles.kernels_of(events)] == [
        ("c", 1, 19.0),
        ("b", 1, 10.0),
        ("a", 2, 6.0),
    ]
    assert profiles.span_and_gaps([]) == (0.0, 0.0)


def test_annotations_are_no_kernels() -> None:
    """Torch's optimizers annotate their steps, and the profiler shows that on the device too."""
    device, host = SimpleNamespace(name="CUDA"), SimpleNamespace(name="CPU")
    events = [
        SimpleNamespace(name="kernel", device_type=device, is_user_annotation=False),
        SimpleNamespace(name="Optimizer.step#AdamW.step", device_type=device, is_user_annotation=True),
        SimpleNamespace(name="aten::add", device_type=host, is_user_annotation=False),
    ]
    assert [event.name for event in events if profiles._is_kernel(event)] == ["kernel"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(3).sum()
    real = profiler.events()
    assert real
    assert not any(profiles._is_kernel(event) for event in real), "and torch's events have what is asked of them"


def test_a_profile_that_cannot_be_taken_has_a_reason() -> None:
    found = profiles.profile("case", "nobody's", lambda: out_of_memory(None), NoGpu())
    assert found.failure is not None
    assert found.failure.startswith("OutOfMemoryError")


# ---------------------------------------------------------------------------------------------------------------------- targets


def result(name: str, milliseconds: float, *, percent: float = 50.0) -> Result:
    return Result(
        contender=name,
        library="nobody",
        algorithm="AdamW",
        storage="ordinary",
        state="",
        shared_moments=True,
        writes_gradients=False,
        samples=9,
        milliseconds=milliseconds,
        quartiles=(milliseconds, milliseconds),
        ratio=milliseconds / 2.0,  # to the baseline
        ratio_quartiles=(1.0, 1.0),
        bytes_per_element=28,
        gigabytes_per_second=1.0,
        percent_of_stream=percent,
        device_milliseconds=milliseconds / 2,
        host_milliseconds=0.1,
    )


def judged(*results: Result, name: str = "256M") -> dict[str, Any]:
    case = CaseRecord(name=name, dtype="fp32", tensors=1, elements=1, same_elements=None, results=list(results))
    run = Run(environment={"gpu": "no GPU"}, baseline=BASELINE, contenders=[], streams=[], cases=[case])
    return {verdict.target: verdict for verdict in judge(run) if verdict.case == case.title}


def test_a_target_is_met_missed_or_not_measured() -> None:
    found = judged(
        result(BASELINE, 2.0),
        result(ADAMW, 2.02, percent=89.9),
        result(STABLE_ADAMW, 2.6, percent=90.0),
        result("optimi StableAdamW triton", 3.9),
        result(ADAMW + GRAPH, 1.9, percent=91.0),
    )
    percent = found[f"{ADAMW}: percent of the bandwidth of the copy"]
    assert (percent.met, percent.measured, percent.alone, percent.graph) == (False, 89.9, 179.8, 91.0)
    assert found[f"{STABLE_ADAMW}: percent of the bandwidth of the copy"].met
    ratio = found[f"{ADAMW}: times the time of {BASELINE}"]
    assert (ratio.met, ratio.measured, ratio.alone, ratio.graph) == (False, 1.01, 1.01, 0.95)
    assert found[f"{STABLE_ADAMW}: times the time of {BASELINE}"].met
    faster = found[f"{STABLE_ADAMW}: times as fast as optimi StableAdamW triton"]
    assert (faster.met, faster.measured, faster.bound) == (True, 1.5, ">= 1.5")


def test_a_slow_while_is_no_slow_contender() -> None:
    """Medians of times are of other rounds where a contender took part in few; ratios are of the same."""
    slow = dataclasses.replace(result("optimi StableAdamW triton", 9.0), ratio=1.4)
    found = judged(result(BASELINE, 2.0), result(STABLE_ADAMW, 2.0), slow)
    faster = found[f"{STABLE_ADAMW}: times as fast as {slow.contender}"]
    assert (faster.met, faster.measured) == (False, pytest.approx(1.4))


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    found = judged(result(BASELINE, 2.0), result(STABLE_ADAMW, 2.0), name="GPT-2")
    verdict = found[f"{STABLE_ADAMW}: times as fast as optimi StableAdamW triton"]
    assert (verdict.met, verdict.measured) == (None, None)
    assert verdict.reason == "optimi StableAdamW triton: not among the contenders of the run"
    assert found[f"{STABLE_ADAMW}: times the time of {BASELINE}"].met
    run = Run(environment={"gpu": "no GPU"}, baseline=BASELINE, contenders=[], streams=[])
    assert {verdict.reason for verdict in judge(run)} == {f"the run has no case {t}" for target in TARGETS for t in target.cases}


# ------------------------------------------------------------------------------------------------------------------- the command


def test_make_gpu_bench_wants_a_gpu_and_nothing_of_the_virtual_environment() -> None:
    root = Path(__file__).parents[2]
    command = ["make", "--no-print-directory", "--dry-run", "gpu-bench", "GPU_PYTHON=some-python", "ARGS=--quick"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "some-python -m benchmarks.step --device cuda --quick"
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            step.main(["--device", "cuda"])
        with pytest.raises(ValueError, match="torch finds no GPU here"):
            pick(CUDA)
        assert pick(None).kind == CPU


def test_the_benchmark_imports_nothing_that_a_machine_with_a_gpu_may_lack() -> None:
    """Neither what is developed with nor other optimizers."""
    lacking = ["optimi", "deepspeed", "hypothesis", "pytest", "matplotlib"]
    code = f"import sys; import benchmarks.step; print([name for name in {lacking} if name in sys.modules])"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True, timeout=100)
    assert result.stdout.strip() == "[]"
