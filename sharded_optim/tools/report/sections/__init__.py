"""The sections of a report: a function `build` for each returns the content below its heading.

A value that a run has not recorded becomes a note that says so. A new section is a function here in `SECTIONS`, and a file if it is long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sharded_optim.tools.report.charts import Item, Section
from sharded_optim.tools.report.sections import clipping, curves, loss, rms, skipped, tables
from sharded_optim.tools.runs import Run

__all__ = ["SECTIONS", "sections_of"]

# Anchor, title, and the function of the runs, each with at least one training record, by their labels. In the order of the page.
SECTIONS: tuple[tuple[str, str, Callable[[Mapping[str, Run]], list[Item]]], ...] = (
    ("runs", "Runs", tables.overview),
    ("loss", "Loss", loss.build),
    ("rms", "Update RMS", rms.build),
    ("clipping", "Update clipping", clipping.build),
    ("grad-norm", "Gradient norm", curves.grad_norm),
    ("schedule", "Learning rate and weight decay", curves.schedule),
    ("speed", "Throughput and time of a step", curves.speed),
    ("skipped", "Skipped steps and non-finite gradients", skipped.build),
    ("config", "Config", tables.config),
    ("environment", "Environment", tables.environment),
)


def sections_of(runs: Mapping[str, Run]) -> list[Section]:
    """Return the sections of a report about these runs, given by label."""
    return [Section(key=key, title=title, items=build(runs)) for key, title, build in SECTIONS]
