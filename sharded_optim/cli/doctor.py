"""`sharded-optim doctor`: check this machine, or torchrun's ranks. The checks are in `sharded_optim/tools/doctor/`; this file prints."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import textwrap
from collections.abc import Iterator
from typing import Annotated, TextIO

import typer

from sharded_optim.cli import errors
from sharded_optim.cli.tables import counted, plain, print_table, table
from sharded_optim.sharding.ranks import named_ranks
from sharded_optim.tools.doctor import TIMEOUT, Finding, Report, examine

__all__ = ["doctor"]

COLUMNS = 100
LINES = 45  # that fit on a screen
WIDEST_VALUE = 57  # characters; longer values are in full below the table, and in the JSON
SECTIONS = ("environment", "backends", "storage", "ranks")


def doctor(
    folder: Annotated[str, typer.Option(help="folder of checkpoints; test files there are removed afterwards")] = ".",
    quick: Annotated[bool, typer.Option("--quick", help="do not measure the write speed, nor collect torch's report")] = False,
    timeout: Annotated[float, typer.Option(help="seconds to wait for another rank")] = TIMEOUT,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, in bytes and seconds")] = False,
) -> None:
    """Check whether this machine can run a training job. Exit status 1: there is a problem.

    Under torchrun it also checks that all ranks agree: torchrun --nproc-per-node 2 --no-python sharded-optim doctor
    """
    stdout = sys.stdout
    with errors.for_users(), errors.exit_on_sigterm(), _redirected(2, sys.stderr) as descriptor:  # libraries print while they are imported

        def report_to(report: Report) -> None:
            with _redirected(descriptor, stdout):
                print(json.dumps(report.as_data(), indent=2, allow_nan=False)) if as_json else _print(report)

        healthy = examine(folder, quick=quick, timeout=timeout, report_to=report_to)
    if not healthy:
        raise typer.Exit(1)


@contextlib.contextmanager
def _redirected(descriptor: int, stream: TextIO) -> Iterator[int]:
    """Redirect stdout, also of C++ libraries, to a file descriptor and a stream. Yields a descriptor of the former stdout."""
    sys.stdout.flush()
    former = os.dup(1)
    os.dup2(descriptor, 1)
    try:
        with contextlib.redirect_stdout(stream):
            yield former
            stream.flush()
    finally:
        os.dup2(former, 1)
        os.close(former)


# --------------------------------------------------------------------------------------------------------------------------- print


def _print(report: Report) -> None:
    first = report.ranks[0]
    world_size = report.world_size or len(report.ranks)
    of_ranks = "" if world_size == 1 else f", rank 0 of {world_size}"
    print(f"{first.host}{of_ranks}\n")
    grid = table("part", "check", "status", "result")
    section = ""
    shown = (*first.findings, *report.together)
    for finding in sorted(shown, key=lambda finding: SECTIONS.index(finding.section)):
        heading, section = finding.section if finding.section != section else "", finding.section
        style = None if finding.status in ("ok", "absent") else "bold"
        status = "-" if finding.status == "absent" else finding.status
        grid.add_row(heading, plain(finding.name), status, plain(_short(_value(finding))), style=style)
    print_table(grid)
    notes = _notes(report)
    room = LINES - len(shown) - 7  # for the host, headings, blank lines and the verdict
    for line in notes if len(notes) <= room else [*notes[: room - 1], f"and {len(notes) - room + 1} lines more: --json has all"]:
        print(line)
    print(_verdict(report))


def _value(finding: Finding) -> str:
    return f"{finding.value}: {finding.way_out}" if finding.status == "absent" and finding.way_out else finding.value


def _short(text: str) -> str:
    return text if len(text) <= WIDEST_VALUE else f"{text[: WIDEST_VALUE - 3]}..."


def _notes(report: Report) -> list[str]:
    """Return a line for each distinct problem and warning, with its ranks and the way out; problems first."""
    ranks_of: dict[tuple[str, str], list[int]] = {}
    for rank in report.ranks:
        for finding in rank.findings:
            ranks_of.setdefault(_note(finding), []).append(rank.rank)
    for finding in report.together:
        ranks_of.setdefault(_note(finding), [])
    lines = []
    for kind in ("problem", "warning"):
        for (status, text), ranks in ranks_of.items():
            if status == kind:
                lines += textwrap.wrap(f"{status}{_on(ranks, len(report.ranks))}: {text}", COLUMNS, subsequent_indent="  ")
    return lines


def _note(finding: Finding) -> tuple[str, str]:
    return finding.status, f"{finding.section} {finding.name}: {finding.value}; {finding.way_out}"


def _on(ranks: list[int], world_size: int) -> str:
    return "" if not ranks or len(ranks) == world_size else f" on {named_ranks(ranks)}"


def _verdict(report: Report) -> str:
    statuses = [status for status, _ in {_note(each) for each in report.findings}]
    problems, warnings = statuses.count("problem"), statuses.count("warning")
    counts = f"{counted(problems, 'problem')}, {counted(warnings, 'warning')}"
    return f"{counts}: {'a job would fail or be wrong here' if problems else 'ready to train'}"
