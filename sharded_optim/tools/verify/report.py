"""The result of a verification, as data and as text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Difference", "Reason", "Report"]

SHOWN = 8  # most differences in `Report.text`


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A tensor whose value under sharding differs from that in one process.

    Attributes:
        storage: how ranks hold the tensor.
        step: the first step that differs, counted from 0.
        error: the largest relative error of any step: max |parameter - reference| / max |reference|.
    """

    name: str
    shape: tuple[int, ...]
    storage: str
    step: int
    error: float


@dataclass(frozen=True, kw_only=True)
class Reason:
    """A fault, or the most likely cause of the differences.

    Attributes:
        kind: "replicas apart", "built before sharding", "no effect", "slice", "state lost on load", "weights lost on load", "groups",
            "clipping" or "unknown".
        way_out: the remedy.
    """

    kind: str
    text: str
    way_out: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result for one optimizer under one way to shard.

    Attributes:
        steps: the number of compared steps; less than asked for if a failure ended the ranks.
        tensors: the number of compared tensors.
        differences: the tensors that differ by more than the tolerance, the largest error first.
        rounding: the largest relative error of any tensor; 0.0 if all bits are equal. In JSON, errors that are not finite are null.
        failure: the reason why ranks have ended early, or could not begin; None if they have done all steps.
        notes: observations that are no faults.
    """

    sharding: str
    world_size: int
    optimizer: str
    steps: int
    tensors: int
    differences: tuple[Difference, ...]
    reasons: tuple[Reason, ...]
    rounding: float
    failure: str | None
    notes: tuple[str, ...]
    seconds: float

    @property
    def is_ok(self) -> bool:
        return not (self.differences or self.reasons or self.failure)

    @property
    def verdict(self) -> str:
        """The result in a few words."""
        if self.failure and not self.differences and not self.reasons:
            return "failed"
        if self.differences:
            return f"differs by {self.differences[0].error:.1e}"
        if self.reasons:
            return f"wrong: {self.reasons[0].kind}"
        return "bitwise" if self.rounding == 0.0 else f"equal to {self.rounding:.0e}"

    def as_data(self) -> dict[str, Any]:
        data = {"ok": self.is_ok, "verdict": self.verdict, **asdict(self)}
        data["rounding"] = _finite(self.rounding)
        data["differences"] = [each | {"error": _finite(each["error"])} for each in data["differences"]]
        return data

    def text(self) -> str:
        """Format the report as lines: the verdict, reasons with remedies, and the largest differences."""
        lines = [f"{self.optimizer}, {self.sharding} on {self.world_size} ranks: {self.verdict}"]
        lines += [f"  after {self.steps} steps: {self.failure}"] if self.failure else []
        for reason in self.reasons:
            lines += [f"  {reason.kind}: {reason.text}", f"    -> {reason.way_out}"]
        for each in self.differences[:SHOWN]:
            shape = " x ".join(map(str, each.shape)) or "scalar"
            lines.append(f"  {each.error:.1e} from step {each.step} on: {each.name} ({shape}, {each.storage})")
        if len(self.differences) > SHOWN:
            lines.append(f"  and {len(self.differences) - SHOWN} of {self.tensors} tensors more")
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
