"""The optimizers' own process group, and errors that all ranks raise together: if one rank raised alone, the others would wait."""

from __future__ import annotations

import hashlib
import re
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from sharded_optim.sharding.waiting import waiting_for

__all__ = [
    "COLLECTIVE_ERRORS",
    "gather_messages",
    "gather_objects",
    "join_messages",
    "listed",
    "message_of",
    "named_ranks",
    "naming_missing_ranks",
    "own_process_group",
    "raise_together",
    "raising_together",
    "ranks_where",
    "timeout_of",
]

T = TypeVar("T")

# The errors of torch.distributed when a rank is missing; gloo's are plain RuntimeErrors.
COLLECTIVE_ERRORS = (RuntimeError, dist.DistError, dist.DistBackendError, dist.DistNetworkError)
LOST_RANK = re.compile(r"timed out|timeout|closed|reset|refused|broken pipe|abort|exited", re.IGNORECASE)  # in gloo's and NCCL's words
REPORTING_TIME = 3.0  # seconds to wait for other ranks to report that the collective has failed on them too

# Own groups, by the group with the same ranks. Held weakly: torch.distributed owns groups, and must be the one to end their threads.
_own_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[str | None, str], weakref.ref[dist.ProcessGroup]]] = (
    weakref.WeakKeyDictionary()
)


_failures: dict[str, int] = {}  # number of failed collectives by group name, which a later group may reuse


def own_process_group(
    process_group: dist.ProcessGroup | None, backend: str | None = None, *, purpose: str = ""
) -> dist.ProcessGroup | None:
    """Return a process group of the same ranks that only optimizers use, so that their collectives never interleave with a wrapper's.

    Args:
        process_group: the ranks; None: the world. The first call for a group, backend and purpose is a collective over it.
        backend: the backend of the returned group; None: the same as that of `process_group`, as for steps.
        purpose: there is a separate group for each purpose, so that its collectives may run in the background.

    Returns:
        None when this process is alone.
    """
    if not dist.is_initialized():
        return None
    world = dist.group.WORLD
    parent = process_group or world
    if parent is None or dist.get_world_size(parent) == 1:
        return None
    groups = _own_groups.setdefault(parent, {})
    known = groups.get((backend, purpose))
    own = None if known is None else known()
    if own is None:
        if dist.get_rank(parent) < 0:
            raise ValueError(f"rank {dist.get_rank()} is not in the optimizer's process_group; give each rank a group that it is in")
        ranks = dist.get_process_group_ranks(parent)
        with waiting_for(parent, "making the optimizers' own process group, before the first step"):
            created = dist.new_group(ranks, timeout_of(parent), backend, use_local_synchronization=parent is not world)
        assert isinstance(created, dist.ProcessGroup), "this rank is in the group"
        own = created
        groups[backend, purpose] = weakref.ref(own)
    return own


def timeout_of(process_group: dist.ProcessGroup) -> timedelta | None:
    """Return the timeout of a process group, which own groups copy so as to fail when users expect it; None if its backend has none."""
    for device_type in ("cuda", "cpu"):
        try:
            return process_group._get_backend(torch.device(device_type)).options._timeout  # pyright: ignore
        except (AttributeError, RuntimeError):
            continue
    return None


@contextmanager
def naming_missing_ranks(process_group: dist.ProcessGroup, what: str) -> Iterator[None]:
    """Context around a collective: if it fails, the error names the ranks that did not take part.

    Args:
        process_group: the process group of the collective.
        what: the purpose of the collective, for the error message.

    Raises:
        RuntimeError: instead of an error of torch.distributed.
    """
    try:
        with waiting_for(process_group, what):
            yield
    except RuntimeError as error:
        if type(error) not in COLLECTIVE_ERRORS or not LOST_RANK.search(str(error)):
            raise  # out of memory, for example
        missing = _missing_ranks(process_group)
        who = f"{named_ranks(missing)} did not take part in" if missing else "the ranks lost each other in"
        raise RuntimeError(
            f"{who} {what}: a rank has raised an error, has died or has called step less often than this one. Its own error says why; if "
            f"there is none, make every rank call step equally often ({error})"
        ) from error


def _missing_ranks(process_group: dist.ProcessGroup) -> list[int]:
    """Return the ranks that do not report, within `REPORTING_TIME`, that the collective has failed on them too.

    A collective that fails on one waiting rank soon fails on all waiting ranks. They report through the job's rendezvous store:
    `_get_default_store`, a private name, is tried with torch 2.11 and 2.13.
    """
    try:
        store = dist.distributed_c10d._get_default_store()
        ranks = dist.get_process_group_ranks(process_group)
        number = _failures[process_group.group_name] = _failures.get(process_group.group_name, 0) + 1
        keys = {rank: f"sharded_optim/failed/{process_group.group_name}/{number}/{rank}" for rank in ranks}
        store.set(keys[dist.get_rank()], "")
        deadline = time.monotonic() + REPORTING_TIME
        while (missing := [rank for rank in ranks if not store.check([keys[rank]])]) and time.monotonic() < deadline:
            time.sleep(0.05)
    except (AttributeError, RuntimeError, ValueError):  # the store has gone, with the process that served it
        return []
    return missing


def message_of(failure: Exception) -> str:
    """Return the text of this rank's error, for all ranks to raise as a ValueError."""
    return str(failure) if isinstance(failure, ValueError) else repr(failure)


def gather_messages(failure: Exception | str | None, process_group: dist.ProcessGroup | None) -> str:
    """Gather the errors of all ranks in one text, for every rank to raise; empty if no rank has an error. A collective."""
    message = message_of(failure) if isinstance(failure, Exception) else failure
    return message or "" if process_group is None else join_messages(gather_objects(message, process_group))


def gather_objects(value: T, process_group: dist.ProcessGroup | None) -> list[T]:
    """Return the values of all ranks, in the order of ranks; only this rank's if the process is alone. A collective."""
    if process_group is None:
        return [value]
    values = [value] * dist.get_world_size(process_group)
    dist.all_gather_object(values, value, group=process_group)
    return values


def ranks_where(condition: bool, process_group: dist.ProcessGroup | None) -> list[int]:
    """Return the ranks on which a condition holds; an empty list if this process is alone. A collective."""
    return [] if process_group is None else [rank for rank, holds in enumerate(gather_objects(condition, process_group)) if holds]


def raise_together(failure: Exception | None, description: object, process_group: dist.ProcessGroup | None) -> None:
    """Raise an error on every rank if any rank has failed, or if the ranks' descriptions differ. A collective.

    Args:
        failure: this rank's error; None if it has none.
        description: its `repr` must be the same on all ranks, if none has failed.

    Raises:
        ValueError: a rank has failed (names all ranks with errors), or the descriptions differ.
        Exception: `failure` itself, on this rank, if it is no ValueError or this process is alone.
    """
    digest = hashlib.sha256(repr(description).encode()).hexdigest()
    of_ranks = gather_objects((None if failure is None else message_of(failure), digest), process_group)
    if failure is not None and (process_group is None or not isinstance(failure, ValueError)):
        raise failure
    messages = [message for message, _ in of_ranks]
    if any(messages):
        raise ValueError(join_messages(messages)) from failure
    if len({digest for _, digest in of_ranks}) > 1:
        ranks = [rank for rank, (_, digest) in enumerate(of_ranks) if digest != of_ranks[0][1]]
        raise ValueError(
            f"rank {ranks[0]} has other parameters (names, shapes, dtypes, order) or options than rank 0; build the same model and "
            f"optimizer on every rank"
        )


@contextmanager
def raising_together(process_group: dist.ProcessGroup | None, describe: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Context that raises an error of one rank on every rank: see `raise_together`. Its end is a collective.

    Args:
        process_group: the ranks, all of which must enter the context; None: this process is alone.
        describe: called at the end; its result must be the same on all ranks.
    """
    try:
        yield
        description = describe()
    except Exception as failure:  # the other ranks must get the error before this one raises
        raise_together(failure, None, process_group)
        raise
    raise_together(None, description, process_group)


def join_messages(messages: Sequence[str | None]) -> str:
    r"""Join the messages of all ranks: a line for each distinct message, with its ranks.

    >>> join_messages(["no gradient", None, "no gradient", "NaN"])
    'ranks 0, 2: no gradient\nrank 3: NaN'
    """
    ranks_of: dict[str, list[int]] = {}
    for rank, message in enumerate(messages):
        if message:
            ranks_of.setdefault(message, []).append(rank)
    lines = []
    for message, ranks in ranks_of.items():
        who = "all ranks" if len(ranks) == len(messages) > 1 else named_ranks(ranks)
        lines.append(f"{who}: {message}")
    return "\n".join(lines)


def named_ranks(ranks: Sequence[int]) -> str:
    """List ranks in words for error messages.

    >>> named_ranks([3]), named_ranks([0, 2])
    ('rank 3', 'ranks 0, 2')
    """
    return f"rank{'s' if len(ranks) > 1 else ''} {listed(ranks)}"


def listed(items: Sequence[object]) -> str:
    """List the first eight items for error messages, and how many more there are."""
    return ", ".join(map(str, items[:8])) + (f" and {len(items) - 8} more" if len(items) > 8 else "")
