"""Findings about a machine, as data that can be sent between ranks, printed and written as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

__all__ = ["Datum", "Finding", "RankReport", "Report", "Status", "one_line"]

Status = Literal["ok", "absent", "warning", "problem"]  # absent: not installed, and nothing that is installed needs it
Datum = str | int | float | bool | None
STATUSES: tuple[Status, ...] = get_args(Status)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check.

    Attributes:
        section: the section of the report.
        name: unique within a section.
        value: the result, for people.
        way_out: the remedy; every warning and problem has one.
        data: the result, for programs; in bytes, seconds, bytes per second.
        alike: a value that must be equal on all ranks; None if it may differ.
    """

    section: str
    name: str
    status: Status
    value: str
    way_out: str | None = None
    data: Mapping[str, Datum] = field(default_factory=dict)
    alike: str | None = None

    def __post_init__(self) -> None:
        assert self.status in STATUSES, self.status
        assert self.way_out or self.status in ("ok", "absent"), f"{self.name}: what is wrong has a way out"
        infinite = [key for key, value in self.data.items() if isinstance(value, float) and not math.isfinite(value)]
        assert not infinite, f"{self.name}: JSON has no number for {infinite}"


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """The findings of one rank about itself."""

    rank: int
    host: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The findings of every rank about itself, and the findings about all ranks together."""

    world_size: int | None = None  # None: the number of rank reports; it is larger if ranks are missing
    ranks: tuple[RankReport, ...]
    together: tuple[Finding, ...]
    environment: str | None = None  # torch's report on rank 0: hardware, drivers, libraries

    @property
    def findings(self) -> tuple[Finding, ...]:
        return (*(finding for each in self.ranks for finding in each.findings), *self.together)

    @property
    def status(self) -> Status:
        """The worst status of a finding; "absent" counts as "ok"."""
        there = {each.status for each in self.findings}
        return "problem" if "problem" in there else "warning" if "warning" in there else "ok"

    def as_data(self) -> dict[str, Any]:
        """Return the report as data for JSON, without `alike`, which is only compared between ranks."""
        data = asdict(self, dict_factory=lambda fields: {name: value for name, value in fields if name != "alike"})
        return {"status": self.status, **data, "world_size": self.world_size or len(self.ranks)}


def one_line(error: object) -> str:
    r"""Return the first line of an error message.

    >>> one_line("no driver\n  at driver.cpp:12")
    'no driver'
    """
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
