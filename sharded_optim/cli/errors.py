"""How a command ends otherwise than by its result.

Errors of the user: the sentence on stderr, and exit status 2, as for a wrong option; 1 where a checkpoint is damaged. SIGTERM: an exit.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from sharded_optim.checkpoint.errors import CheckpointError, DamagedError
from sharded_optim.tools.imported import MissingPackageError

__all__ = ["exit_on_sigterm", "for_users"]


@contextmanager
def for_users() -> Iterator[None]:
    """End the command where what it was given is refused; other exceptions are ours, and keep their traceback.

    Warnings are sentences for the user too.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    except (ValueError, OSError, CheckpointError, MissingPackageError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1 if isinstance(error, DamagedError) else 2) from None


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exit that removes what was written, and ends processes that were started."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:  # as ranks do that have agreed on their exit status
            signal.signal(signal.SIGTERM, before)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
