"""Exit a command after an error of the user, or on SIGTERM.

The message of the error is printed on stderr. The exit status is 2, as for a wrong option, or 1 if a checkpoint is damaged.
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
    """Exit after an error of the user, with its message. Other exceptions are bugs of this library, and keep their traceback.

    Warnings are printed as messages too.
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
    """Raise SystemExit on SIGTERM, so that temporary files are removed and child processes are ended."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:  # ranks that have agreed on their exit status ignore it
            signal.signal(signal.SIGTERM, before)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
