"""What this library wants to reach on a GPU, and whether a run reached it. A new target is one new entry of `TARGETS`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.contenders import BASELINE, GRAPH
from benchmarks.records import CaseRecord, Result, Run, Verdict

__all__ = ["COPY", "TARGETS", "Target", "judge"]

COPY = "the copy"
ADAMW, STABLE_ADAMW = "ours AdamW triton", "ours StableAdamW triton"
FLAT, LIST = ("256M fp32", "1G fp32"), ("GPT-2 fp32",)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound on a contender, in some cases.

    Attributes:
        against: COPY: percent of its bandwidth, at least `bound`. A contender: its time is to be multiplied by at most `bound`, or, where
            `faster`, divided by at least that.
        cases: titles.
    """

    contender: str
    against: str
    bound: float
    cases: tuple[str, ...]
    faster: bool = False

    @property
    def unit(self) -> str:
        return "%" if self.against == COPY else "x"

    @property
    def text(self) -> str:
        if self.against == COPY:
            return f"{self.contender}: percent of the bandwidth of {COPY}"
        return f"{self.contender}: {'times as fast as' if self.faster else 'times the time of'} {self.against}"

    @property
    def at_least(self) -> bool:
        return self.faster or self.against == COPY

    def holds(self, measured: float) -> bool:
        return measured >= self.bound if self.at_least else measured <= self.bound


TARGETS = (
    Target(contender=ADAMW, against=COPY, bound=90, cases=FLAT),
    Target(contender=STABLE_ADAMW, against=COPY, bound=90, cases=FLAT),
    Target(contender=ADAMW, against=BASELINE, bound=1.00, cases=FLAT),
    Target(contender=STABLE_ADAMW, against=BASELINE, bound=1.30, cases=FLAT),
    Target(contender=STABLE_ADAMW, against="optimi StableAdamW triton", bound=1.5, faster=True, cases=FLAT),
    Target(contender=STABLE_ADAMW, against="optimi StableAdamW triton", bound=3, faster=True, cases=LIST),
    Target(contender=STABLE_ADAMW, against=BASELINE, bound=1.1, cases=LIST),
    Target(contender=ADAMW, against="optimi AdamW triton", bound=3, faster=True, cases=LIST),
    Target(contender=ADAMW, against=BASELINE, bound=1.1, cases=LIST),
)


def judge(run: Run, targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """A verdict for each target in each of its cases, in those of the run or not."""
    cases = {case.title: case for case in run.cases}
    return [_verdict(target, title, cases.get(title)) for target in targets for title in target.cases]


def _verdict(target: Target, title: str, case: CaseRecord | None) -> Verdict:
    measured = alone = graph = None
    reason = f"the run has no case {title}"
    if case is not None:
        ours, replayed = case.of(target.contender), case.of(target.contender + GRAPH)
        other = None if target.against == COPY else case.of(target.against)
        absent = [name for name in (target.contender, target.against) if name != COPY and case.of(name) is None]
        reason = "; ".join(f"{name}: {_why(case, name)}" for name in absent) or None
        if reason is None and ours is not None:
            measured, alone = _measured(target, ours, other), _alone(target, ours, other)
            graph = None if replayed is None else _measured(target, replayed, other)
    return Verdict(
        target=target.text,
        case=title,
        bound=f"{'>=' if target.at_least else '<='} {target.bound:g}",
        unit=target.unit,
        measured=measured,
        alone=alone,
        graph=graph,
        met=None if measured is None else target.holds(measured),
        reason=reason,
    )


def _why(case: CaseRecord, name: str) -> str:
    return next((missing.reason for missing in case.missing if missing.contender == name), "not among the contenders of the run")


def _measured(target: Target, ours: Result, other: Result | None) -> float:
    """What was measured in a row, in the target's unit."""
    if other is None:
        return ours.percent_of_stream
    # Both are medians of ratios in one round, which hold when the machine was slow for a while.
    return other.ratio / ours.ratio if target.faster else ours.ratio / other.ratio


def _alone(target: Target, ours: Result, other: Result | None) -> float | None:
    """The same of the device alone."""
    if ours.device_milliseconds is None:
        return None
    if other is None:
        return ours.percent_of_stream * ours.milliseconds / ours.device_milliseconds
    if other.device_milliseconds is None:
        return None
    ratio = ours.device_milliseconds / other.device_milliseconds
    return 1 / ratio if target.faster else ratio
