"""The sections of a report, a file for each: `build(runs, labels)` returns what stands below the heading.

What a run has not recorded becomes a note that says so. A new section is a new file and a line in `SECTIONS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

from sharded_optim.tools.report.charts import Item, Section
from sharded_optim.tools.report.sections import (
    clipping,
    config,
    environment,
    grad_norm,
    loss,
    overview,
    rms,
    schedule,
    skipped,
    speed,
)
from sharded_optim.tools.runs import Run

__all__ = ["SECTIONS", "sections_of"]


class SectionModule(Protocol):
    """A file of this folder."""

    KEY: str  # the anchor
    TITLE: str

    def build(self, runs: Sequence[Run], labels: Sequence[str]) -> list[Item]:
        """Return what is below the heading.

        Args:
            runs: each with at least one training record.
            labels: a different name for each run.
        """
        ...


# In the order of the page.
SECTIONS = cast("list[SectionModule]", [overview, loss, rms, clipping, grad_norm, schedule, speed, skipped, config, environment])


def sections_of(runs: Sequence[Run], labels: Sequence[str]) -> list[Section]:
    """Return the sections of a report in their order. See `SectionModule.build`."""
    return [Section(key=each.KEY, title=each.TITLE, items=each.build(runs, labels)) for each in SECTIONS]
