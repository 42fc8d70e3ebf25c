"""The errors that `so.checkpoint` raises, for users and for the commands of `cli/checkpoint/`."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["CheckpointError", "DamagedError", "MismatchError", "NoCheckpointError", "UnreadableError", "shorten"]


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved, found or loaded."""


class MismatchError(CheckpointError, ValueError):
    """The checkpoint may be intact, but does not fit the model, the optimizer or this version of the library; nothing was changed."""


class DamagedError(CheckpointError):
    """The stored bytes are not those that were saved. `problems` has a line for each file or tensor."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems) or (message,)


class UnreadableError(DamagedError):
    """The storage cannot be read at the moment; the checkpoint may be intact."""


class NoCheckpointError(CheckpointError):
    """The root holds no checkpoint."""


def shorten(problems: Sequence[str], limit: int) -> str:
    """Join the first `limit` problems as lines of an error message, and count the rest."""
    return "\n  ".join([*problems[:limit], *([f"and {len(problems) - limit} more"] if len(problems) > limit else [])])
