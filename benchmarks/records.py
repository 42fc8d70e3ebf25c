"""What the step benchmark finds out, as it is written to JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["CaseRecord", "Missing", "Profile", "Result", "Run", "Share", "Stream", "Verdict", "from_json"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """A contender in a case."""

    contender: str
    library: str
    algorithm: str
    storage: str  # of parameters and gradients
    state: str  # what it keeps of each parameter
    shared_moments: bool  # whether its moments lie where those of similar contenders do
    writes_gradients: bool  # whether a step changes them; then they are restored before each, untimed
    samples: int
    milliseconds: float  # median of a step
    quartiles: tuple[float, float]  # of the same
    ratio: float  # to the baseline in the same round, median over rounds; below 1 is faster
    ratio_quartiles: tuple[float, float]
    bytes_per_element: int  # that any implementation of it has to read and write
    gigabytes_per_second: float  # that many bytes in the median step
    percent_of_stream: float  # of the fastest stream on the same kind of memory; on a GPU of the copy
    held_bytes_per_element: int = 0  # of parameter, gradient and state
    host_milliseconds: float | None = None  # of the host in a step by itself, median; None where the host is the device
    device_milliseconds: float | None = None  # of the device alone, with the host ahead, median; None likewise


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A contender that is not in a case, and why."""

    contender: str
    library: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class CaseRecord:
    name: str
    dtype: str
    tensors: int
    elements: int
    same_elements: str | None  # name of the case that has as many elements in one tensor
    results: list[Result] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    peak_bytes: int | None = None  # of tensors of all contenders, on a GPU; on a CPU of the process until then

    @property
    def title(self) -> str:
        return f"{self.name} {self.dtype}"

    def of(self, contender: str) -> Result | None:
        return next((result for result in self.results if result.contender == contender), None)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """How fast one torch operation goes through large fp32 tensors."""

    operation: str
    storage: str
    bytes_per_element: int  # read and written
    gigabytes_per_second: float  # at best
    median_gigabytes_per_second: float = 0.0
    when: str = "before"  # or "after" the cases


@dataclass(frozen=True, kw_only=True)
class Share:
    """Of a step: a kernel, or a function of the host.

    Attributes:
        count: how often it ran.
        microseconds: of all of these, without what it called.
    """

    name: str
    count: float
    microseconds: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a step of a contender did; a profiler slows the host, so these times are shares and no measurements.

    Attributes:
        kernels: that ran on the device, copies and fills among them, the longest first; none on a CPU.
        kernels_milliseconds: of them all; as they may overlap, it may be more than the span.
        span_milliseconds: from the begin of the first to the end of the last.
        gaps_milliseconds: of the span, in which none ran.
        functions: of the host, Python's and what it calls, per step, the longest first; only the first ones.
        failure: why there is nothing to tell.
    """

    case: str
    contender: str
    kernels: list[Share] = field(default_factory=list)
    kernels_milliseconds: float = 0.0
    span_milliseconds: float = 0.0
    gaps_milliseconds: float = 0.0
    functions: list[Share] = field(default_factory=list)
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A target and whether it was met. Measured as the target's unit says; None where there was nothing to measure."""

    target: str
    case: str
    bound: str
    unit: str
    measured: float | None
    alone: float | None  # likewise, of the device alone
    graph: float | None  # likewise, replayed as a CUDA graph
    met: bool | None
    reason: str | None = None  # why it was not measured


@dataclass(frozen=True, kw_only=True)
class Run:
    environment: dict[str, Any]
    baseline: str
    contenders: list[str]  # in the order in which to show them
    streams: list[Stream]
    cases: list[CaseRecord] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # what a reader should know of how contenders behaved
    verdicts: list[Verdict] = field(default_factory=list)
    profiles: list[Profile] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return self.environment["gpu"] is not None


def from_json(content: dict[str, Any]) -> Run:
    """A run as it was written, but for verdicts and profiles."""
    cases = [
        CaseRecord(
            **case | {"results": [Result(**each) for each in case["results"]], "missing": [Missing(**each) for each in case["missing"]]}
        )
        for case in content["cases"]
    ]
    streams = [Stream(**each) for each in content["streams"]]
    return Run(**content | {"cases": cases, "streams": streams, "verdicts": [], "profiles": []})
