"""The other ranks that the same launcher has started on this machine, found in /proc and nowhere else.

Only a process found here is ever signalled: what stands in the store can be written by anybody who reaches it.
"""

from __future__ import annotations

import os
import select
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

__all__ = ["Sibling", "gone", "siblings"]


class Sibling(NamedTuple):
    """A child of this process's launcher. `process` is a file descriptor of it, whatever becomes of its pid."""

    rank: int
    pid: int
    process: int


def siblings(launcher: int | None, variable: str) -> list[Sibling]:
    """The other processes of a launcher that have a rank in a variable of their environment. None are seen before Linux 5.3."""
    found = []
    for path in Path("/proc").glob("[0-9]*") if launcher is not None else []:
        with suppress(OSError, LookupError, ValueError, AttributeError):  # it has ended, or is another user's, or has no rank
            parent, rank = _parent_and_rank(path, variable)
            if parent == launcher and path.name != str(os.getpid()):
                process = os.pidfd_open(int(path.name))
                if _parent_and_rank(path, variable) == (parent, rank):  # also now, when no other can take its place
                    found.append(Sibling(rank, int(path.name), process))
    return found


def gone(others: Iterable[Sibling], seconds: float) -> list[Sibling]:
    """Wait for the first of them to end, which a launcher may not have noticed."""
    by_process = {sibling.process: sibling for sibling in others}
    poll = select.poll()
    for process in by_process:
        poll.register(process, select.POLLIN)
    return [by_process[process] for process, _ in poll.poll(1000.0 * seconds)]


def _parent_and_rank(process: Path, variable: str) -> tuple[int, int]:
    parent = int((process / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    entries = [entry.partition("=") for entry in (process / "environ").read_text(errors="replace").split("\0")]
    return parent, int({name: value for name, _, value in entries}[variable])
