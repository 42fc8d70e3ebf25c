"""Log a warning when this rank waits long in a collective, with the missing ranks if they can be determined. Used by `ranks.py`.

Without it, a rank that calls step alone waits silently until the process group's timeout (half an hour under gloo), after which torch
raises. One thread per process, started by the first wait, checks the running waits every few seconds: so a wait costs two microseconds, and
no timer.

A rank that has waited for some seconds posts that in the job's rendezvous store; ranks that have not posted are missing.
`_get_default_store`, a private name, is tried with torch 2.13.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

__all__ = ["waiting_for"]

logger = logging.getLogger(__name__)
LOOK_SECONDS = 5.0  # between two checks; also the length of a wait after which a rank posts it
HINT_SECONDS = 20.0  # the length of a wait after which it is logged


@dataclass(eq=False)
class _Wait:
    """A running wait for the ranks of a process group."""

    what: str
    process_group: Any
    number: int  # counts the waits for the group; the same on all ranks, as they wait in the same order
    since: float = field(default_factory=time.monotonic)
    is_posted: bool = False
    is_hinted: bool = False

    def key(self, rank: int) -> str:
        return f"sharded_optim/waiting/{self.process_group.group_name}/{self.number}/{rank}"


_waits: dict[int, _Wait] = {}  # running waits, by id
_counts: defaultdict[str, int] = defaultdict(int)  # number of waits so far, by group name
_thread: threading.Thread | None = None


@contextmanager
def waiting_for(process_group: dist.ProcessGroup, what: str) -> Iterator[None]:
    """Context around a collective: a warning is logged once if it takes longer than `HINT_SECONDS`.

    Args:
        process_group: the process group of the collective.
        what: the purpose of the collective, for the message.
    """
    if _thread is None or not _thread.is_alive():
        with suppress(RuntimeError):  # no thread can be started: then nothing is logged
            _start()
    name = process_group.group_name
    _counts[name] += 1
    wait = _Wait(what, process_group, _counts[name])
    _waits[id(wait)] = wait
    try:
        yield
    finally:
        del _waits[id(wait)]


def _start() -> None:
    global _thread
    _thread = threading.Thread(target=_look, name="sharded_optim: who is waited for", daemon=True)  # not waited for at exit
    _thread.start()


def _forget() -> None:
    """Forget the parent's thread and waits, in a forked child."""
    global _thread
    _thread = None
    _waits.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _look() -> None:
    while True:
        time.sleep(LOOK_SECONDS)
        for wait in list(_waits.values()):
            waited = time.monotonic() - wait.since
            with suppress(Exception):  # the group or the store may be gone by now, which must not end this thread
                if waited > LOOK_SECONDS and not wait.is_posted:
                    wait.is_posted = True
                    _store().set(wait.key(dist.get_rank()), "")
                if waited > HINT_SECONDS and not wait.is_hinted:
                    wait.is_hinted = True
                    _hint(wait, waited)


def _hint(wait: _Wait, waited: float) -> None:
    missing = _missing(wait)
    who = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing[:8]))}{', ...' if len(missing) > 8 else ''}"
    if id(wait) in _waits:
        logger.warning(
            "rank %d has waited %.0f s for %s in %s. Every rank of the process group must take part. If only some ranks train this model, "
            "give the optimizer process_group= with those; else see what the others are doing",
            dist.get_rank(),
            waited,
            who if missing else "other ranks",
            wait.what,
        )


def _missing(wait: _Wait) -> Sequence[int]:
    """Return the ranks that have not posted this wait; an empty list if the store cannot be read."""
    try:
        store = _store()
        return [rank for rank in dist.get_process_group_ranks(wait.process_group) if not store.check([wait.key(rank)])]
    except (AttributeError, RuntimeError, ValueError):
        return []


def _store() -> Any:
    """Return the job's store with a separate connection: the main thread may be blocked on the default one."""
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()
