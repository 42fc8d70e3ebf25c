"""What can go wrong with a checkpoint, and how all ranks raise it together: one rank raising alone is a hang for the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from sharded_optim.ranks import join_messages

__all__ = ["CheckpointError", "DamagedError", "MismatchError", "together"]

Result = TypeVar("Result")


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved, found or loaded."""


class MismatchError(CheckpointError, ValueError):
    """The checkpoint is whole, but does not fit the model or optimizer; nothing was changed."""


class DamagedError(CheckpointError):
    """What is stored is not what was saved. `problems` has a line for each file or tensor."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems) or (message,)


KINDS: tuple[type[CheckpointError], ...] = (CheckpointError, MismatchError, DamagedError)  # the last that occurs on any rank is raised


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
    told = (None, result) if failure is None else (_kind(failure), _told(failure))
    votes: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(votes, told, group=process_group)
    failed = [kind for kind, _ in votes if kind is not None]
    if failed:
        message = join_messages([None if kind is None else message for kind, message in votes])
        raise KINDS[max(failed)](f"{what} failed: {message}") from failure
    return [result for _, result in votes]


def _kind(failure: Exception) -> int:
    return max(index for index, kind in enumerate(KINDS) if index == 0 or isinstance(failure, kind))


def _told(failure: Exception) -> str:
    return str(failure) if isinstance(failure, CheckpointError | ValueError | OSError) else repr(failure)
