"""The sections of a report. Each section has a function, such as `loss.build`, that returns the content below its heading.

Values that a run has not recorded are replaced by a note. To add a section, write a function, in a new file if it is long, and list it in
`SECTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sharded_optim.tools.report.charts import Item, Section
from sharded_optim.tools.report.sections import clipping, curves, loss, rms, skipped, tables
from sharded_optim.tools.runs import Run

__all__ = ["SECTIONS", "sections_of"]

# (anchor, title, function of the runs by label), in the order of the page. Each run has at least one training record.
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
    """Return the sections of a report about `runs`, which are keyed by label."""
    return [Section(key=key, title=title, items=build(runs)) for key, title, build in SECTIONS]
