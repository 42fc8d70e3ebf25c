"""`sharded-optim report`: a page about training runs. `sharded_optim/tools/report/` writes it; this file reads options and prints paths."""

from __future__ import annotations

import webbrowser
from typing import Annotated

import typer

from sharded_optim.cli import errors
from sharded_optim.tools.report import write_report

__all__ = ["report"]


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="folders of the training job's runs, or the tracker jsonl's")],
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="FILE.html", help="default: report.html in the first RUN")] = None,
    png: Annotated[str | None, typer.Option(metavar="FOLDER", help="write each chart as a PNG into this folder too")] = None,
    refresh: Annotated[int | None, typer.Option(metavar="SECONDS", help="reload the open page at this interval")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="open the page in a browser")] = False,
) -> None:
    """Write one HTML page about a run, or about several side by side: loss, update RMS, clipping, schedule, speed, config.

    The page needs no network. Runs may still be training.
    """
    with errors.for_users(), errors.exit_on_sigterm():
        page, pngs = write_report(runs, output=output, png=png, refresh=refresh)
    for path in (page, *pngs):
        print(path)
    if open_page:
        webbrowser.open(page.resolve().as_uri())
