"""What ranks tell each other, and how all of them raise what one has found: one rank raising alone is a hang for the others."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from sharded_optim.checkpoint.errors import CheckpointError, DamagedError, MismatchError, UnreadableError
from sharded_optim.sharding.ranks import join_messages

__all__ = ["digest_of", "distinct", "refuse_differences", "together"]

Result = TypeVar("Result")

# The last that occurs on any rank is raised.
KINDS: tuple[type[CheckpointError], ...] = (CheckpointError, MismatchError, UnreadableError, DamagedError)


def together(what: str, action: Callable[[], Result], process_group: dist.ProcessGroup | None) -> list[Result]:
    """Do something on every rank, and go on if it went well on all. A collective.

    Args:
        what: is done, for error messages.
        action: without communication.
        process_group: None: this process is alone.

    Returns:
        What each rank's action has returned.

    Raises:
        CheckpointError: on every rank: what the action has raised on any.
    """
    failure: Exception | None = None
    result: Any = None
    try:
        result = action()
    except Exception as error:
        failure = error
    if process_group is None:
        if isinstance(failure, CheckpointError):
            raise failure
        if failure is not None:
            raise CheckpointError(f"{what} failed: {_told(failure)}") from failure
        return [result]
    told = (None, result) if failure is None else (_kind(failure), (_told(failure), getattr(failure, "problems", ())))
    votes: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(votes, told, group=process_group)
    failed = [kind for kind, _ in votes if kind is not None]
    if failed:
        message = f"{what} failed: {join_messages([None if kind is None else told[0] for kind, told in votes])}"
        found = KINDS[max(failed)]
        if issubclass(found, DamagedError):
            problems = dict.fromkeys(problem for kind, told in votes if kind is not None for problem in told[1])
            raise found(message, sorted(problems)) from failure
        raise found(message) from failure
    return [result for _, result in votes]


def _kind(failure: Exception) -> int:
    return KINDS.index(type(failure)) if type(failure) in KINDS else 0


def _told(failure: Exception) -> str:
    return str(failure) if isinstance(failure, CheckpointError | ValueError | OSError) else repr(failure)


def digest_of(value: Any) -> bytes:
    """32 bytes that are the same for equal values that were built alike."""
    return hashlib.sha256(pickle.dumps(value)).digest()


def distinct(value: Result, digests: Sequence[bytes], process_group: dist.ProcessGroup | None) -> list[Result]:
    """What each rank has, where most have the same: each distinct value is sent once. A collective.

    Args:
        value: of this rank.
        digests: of all ranks' values.
    """
    if len(set(digests)) == 1:
        return [value] * len(digests)
    first = {digest: rank for rank, digest in reversed(list(enumerate(digests)))}
    rank = dist.get_rank(process_group)
    sent: list[Any] = [None] * len(digests)
    dist.all_gather_object(sent, value if first[digests[rank]] == rank else None, group=process_group)
    return [sent[first[digest]] for digest in digests]


def refuse_differences(arguments: Sequence[Mapping[str, Any]]) -> None:
    """Raise CheckpointError unless all ranks, in their order, have called with the same."""
    for rank, own in enumerate(arguments):
        for name, value in own.items():
            if value != arguments[0][name]:
                raise CheckpointError(f"{name} is {value!r} on rank {rank}, {arguments[0][name]!r} on rank 0; give the same on all ranks")
