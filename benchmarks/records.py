"""What the step benchmark finds out, as it is written to JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["CaseRecord", "Missing", "Result", "Run", "Stream"]


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
    percent_of_stream: float  # of the fastest stream on the same kind of memory


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
    gigabytes_per_second: float


@dataclass(frozen=True, kw_only=True)
class Run:
    environment: dict[str, Any]
    baseline: str
    contenders: list[str]  # in the order in which to show them
    streams: list[Stream]
    cases: list[CaseRecord] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # what a reader should know of how contenders behaved
