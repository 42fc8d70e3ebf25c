"""How a command fails: the sentence for the user on stderr, and exit status 2, as for a wrong option."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

__all__ = ["for_users"]


@contextmanager
def for_users() -> Iterator[None]:
    """End the command where what it was given is refused; other exceptions are ours, and keep their traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
