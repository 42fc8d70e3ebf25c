"""Pause Python's garbage collector while many long-lived objects are created. Used where the optimizer registers parameters."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_paused"]


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the search for reference cycles, as a context manager or decorator. Reference counting still frees memory.

    Python scans all objects whenever their number has grown by a quarter. For 10,000 parameters that happens several times and takes longer
    than creating the objects, none of which is garbage.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
