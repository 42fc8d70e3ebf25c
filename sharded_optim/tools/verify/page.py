"""Reports as one HTML page, which needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sharded_optim.tools.verify.report import Difference, Report

__all__ = ["page"]

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --good: #3fb950; --bad: #f85149; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
td.number { text-align: right; font-variant-numeric: tabular-nums; } .scroll { overflow-x: auto; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; } code { font-size: .9em; }
"""


def page(reports: Sequence[Report]) -> str:
    """Return a page with a table of all reports, and a part for each that found something."""
    rows = "".join(map(_row, reports))
    parts = "".join(_part(each) for each in reports if not each.is_ok or each.notes)
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>sharded-optim verify</title><style>{STYLE}</style></head><body><h1>Sharded against one process</h1>"
        "<p>Parameters after each step, compared with those of the same optimizer in one process that was given the same gradients.</p>"
        "<div class='scroll'><table><thead><tr><th>sharding<th>ranks<th>optimizer<th>verdict<th>steps<th>seconds</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>{parts}</body></html>\n"
    )


def _row(report: Report) -> str:
    style = "good" if report.is_ok else "bad"
    return (
        f"<tr><td>{escape(report.sharding)}<td class='number'>{report.world_size}<td>{escape(report.optimizer)}"
        f"<td class='{style}'>{escape(report.verdict)}<td class='number'>{report.steps}<td class='number'>{report.seconds:.1f}</tr>"
    )


def _part(report: Report) -> str:
    reasons = "".join(
        f"<p><strong>{escape(each.kind)}</strong>: {escape(each.text)}.<br>{escape(each.way_out.capitalize())}.</p>"
        for each in report.reasons
    )
    failure = f"<p class='bad'>{escape(report.failure)}</p>" if report.failure else ""
    notes = "".join(f"<p>{escape(note)}</p>" for note in report.notes)
    differences = ""
    if report.differences:
        rows = "".join(map(_difference, report.differences))
        differences = (
            "<div class='scroll'><table><thead><tr><th>tensor<th>shape<th>held<th>first step<th>relative error</tr></thead>"
            f"<tbody>{rows}</tbody></table></div>"
        )
    return f"<h2>{escape(report.optimizer)}, {escape(report.sharding)}</h2>{failure}{reasons}{notes}{differences}"


def _difference(each: Difference) -> str:
    shape = " x ".join(map(str, each.shape)) or "scalar"
    return (
        f"<tr><td><code>{escape(each.name)}</code><td>{shape}<td>{escape(each.storage)}<td class='number'>{each.step}"
        f"<td class='number'>{each.error:.1e}</tr>"
    )
