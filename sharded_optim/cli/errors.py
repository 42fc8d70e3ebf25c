"""How a command fails: the sentence for the user on stderr, and exit status 2, as for a wrong option; 1 where a checkpoint is damaged."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from sharded_optim.checkpoint.errors import CheckpointError, DamagedError

__all__ = ["for_users"]


@contextmanager
def for_users() -> Iterator[None]:
    """End the command where what it was given is refused; other exceptions are ours, and keep their traceback.

    Warnings are sentences for the user too.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1 if isinstance(error, DamagedError) else 2) from None


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
