"""What can go wrong with a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["CheckpointError", "DamagedError", "MismatchError", "NoCheckpointError", "UnreadableError"]


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved, found or loaded."""


class MismatchError(CheckpointError, ValueError):
    """The checkpoint is whole, but does not fit the model or optimizer; nothing was changed."""


class DamagedError(CheckpointError):
    """What is stored is not what was saved. `problems` has a line for each file or tensor."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems) or (message,)


class UnreadableError(DamagedError):
    """What is stored cannot be read, now: it need not be damaged."""


class NoCheckpointError(CheckpointError):
    """There is no checkpoint at all."""
