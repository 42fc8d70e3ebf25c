"""Write reports as one HTML page, which needs no network. `page.html.jinja` is the page; all text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2

from sharded_optim.tools.verify.report import Report

__all__ = ["page"]


def page(reports: Sequence[Report]) -> str:
    """Return an HTML page with a table of all reports, and details of each report that has faults or notes."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html.jinja").render(reports=reports)
