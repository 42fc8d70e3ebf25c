"""Actions that succeed on all ranks or fail on all of them, since one rank that raises alone leaves the others waiting.

The collectives of saving, loading and pruning; `tools/divergence.py` uses `gather_distinct` too.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from sharded_optim.checkpoint.errors import CheckpointError, DamagedError, MismatchError, UnreadableError
from sharded_optim.sharding.ranks import gather_objects, join_messages

__all__ = ["all_or_nothing", "digest_of", "gather_distinct", "gather_on_first", "rank_and_world_size", "refuse_differences"]

Result = TypeVar("Result")

# In ascending severity: all ranks raise the most severe type of error that any rank has.
ERRORS: tuple[type[CheckpointError], ...] = (CheckpointError, MismatchError, UnreadableError, DamagedError)


def rank_and_world_size(process_group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return this process's rank in a process group, and the size of the group; (0, 1) for None, this process alone."""
    return (0, 1) if process_group is None else (dist.get_rank(process_group), dist.get_world_size(process_group))


def all_or_nothing(
    what: str,
    action: Callable[[], Result],
    process_group: dist.ProcessGroup | None,
    share: Callable[[Result], Any] = lambda result: result,
) -> tuple[Result, list[Any]]:
    """Run an action on every rank, and raise on all ranks if it failed on any. A collective.

    Args:
        what: the action, for error messages.
        action: must not communicate.
        process_group: None: this process alone.
        share: returns the part of the result that is sent to all ranks, pickled.

    Returns:
        This rank's result, and the shared parts of all ranks, by rank.

    Raises:
        CheckpointError: on every rank: the errors of all ranks, in one message.
    """
    failure: Exception | None = None
    result: Any = None
    shared: Any = None
    try:
        result = action()
        shared = share(result)
    except Exception as error:
        failure = error
    if process_group is None and isinstance(failure, CheckpointError):
        raise failure
    if process_group is None and failure is not None:
        raise CheckpointError(f"{what} failed: {_message(failure)}") from failure
    vote = None if failure is None else (_severity(failure), _message(failure), getattr(failure, "problems", ()))
    votes = gather_objects((vote, shared), process_group)
    failures = [failed for failed, _ in votes]
    if any(failures):
        raise _joined_error(what, failures) from failure
    return result, [shared for _, shared in votes]


def _joined_error(what: str, failures: Sequence[tuple[int, str, Sequence[str]] | None]) -> CheckpointError:
    """Join the failures of ranks into one error. `failures` has one entry per rank; None: the rank has not failed."""
    failed = [failure for failure in failures if failure is not None]
    kind = ERRORS[max(severity for severity, _, _ in failed)]
    message = f"{what} failed: {join_messages([failure and failure[1] for failure in failures])}"
    if not issubclass(kind, DamagedError):
        return kind(message)
    return kind(message, sorted({problem for _, _, problems in failed for problem in problems}))


def _severity(failure: Exception) -> int:
    return ERRORS.index(type(failure)) if type(failure) in ERRORS else 0


def _message(failure: Exception) -> str:
    return str(failure) if isinstance(failure, CheckpointError | ValueError | OSError) else repr(failure)


def digest_of(value: Any) -> bytes:
    """Hash a pickled value to 32 bytes. Equal values have equal digests if they were built alike: pickle depends on shared references."""
    return hashlib.sha256(pickle.dumps(value)).digest()


def gather_distinct(value: Result, digests: Sequence[bytes], process_group: dist.ProcessGroup | None) -> list[Result]:
    """Gather the values of all ranks, sending each distinct value once. A collective.

    Args:
        value: this rank's value.
        digests: the digest of each rank's value, by rank.
    """
    if len(set(digests)) == 1:
        return [value] * len(digests)
    senders = {digest: rank for rank, digest in reversed(list(enumerate(digests)))}
    rank = dist.get_rank(process_group)
    gathered: list[Any] = gather_objects(value if senders[digests[rank]] == rank else None, process_group)
    return [gathered[senders[digest]] for digest in digests]


def gather_on_first(value: Result, process_group: dist.ProcessGroup | None) -> list[Result]:
    """Gather the values of all ranks on rank 0; other ranks get an empty list. A collective."""
    if process_group is None:
        return [value]
    gathered: Any = [None] * dist.get_world_size(process_group) if dist.get_rank(process_group) == 0 else None
    dist.gather_object(value, gathered, group=process_group, group_dst=0)
    return gathered or []


def refuse_differences(arguments: Sequence[Mapping[str, Any]]) -> None:
    """Raise CheckpointError unless all ranks passed the same arguments. `arguments` has one entry per rank."""
    for rank, own in enumerate(arguments):
        for name, value in own.items():
            if value != arguments[0][name]:
                raise CheckpointError(f"{name} is {value!r} on rank {rank}, {arguments[0][name]!r} on rank 0; give the same on all ranks")
