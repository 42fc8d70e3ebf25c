"""Find, in /proc alone, the processes of other ranks that the same launcher has started on this machine.

Only these processes are ever signalled. Pids in the store are not trusted, as any process that can reach the store can write to it.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

__all__ = ["Sibling", "siblings", "wait_for_exit"]


class Sibling(NamedTuple):
    """Another child of this process's launcher."""

    rank: int
    pid: int
    process: int  # pidfd: a file descriptor that refers to this process even after its pid is used again


def siblings(launcher: int | None, variable: str) -> list[Sibling]:
    """List the other processes of a launcher that have a rank in an environment variable. Without a launcher or Linux 5.3 it is empty."""
    found = []
    for path in Path("/proc").glob("[0-9]*") if launcher is not None else []:
        with suppress(OSError, LookupError, ValueError, AttributeError):  # it has ended, or is another user's, or has no rank
            parent, rank = _parent_and_rank(path, variable)
            if parent == launcher and path.name != str(os.getpid()):
                process = os.pidfd_open(int(path.name))
                if _parent_and_rank(path, variable) == (parent, rank):  # checked again, as the pid may have been reused before `pidfd_open`
                    found.append(Sibling(rank, int(path.name), process))
    return found


def wait_for_exit(others: Collection[Sibling], seconds: float) -> list[Sibling]:
    """Wait at most `seconds` for a process to end, and return all that have ended. Their launcher may not have noticed yet."""
    ended = wait([sibling.process for sibling in others], seconds)
    return [sibling for sibling in others if sibling.process in ended]


def _parent_and_rank(process: Path, variable: str) -> tuple[int, int]:
    parent = int((process / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    entries = [entry.partition("=") for entry in (process / "environ").read_text(errors="replace").split("\0")]
    return parent, int({name: value for name, _, value in entries}[variable])
