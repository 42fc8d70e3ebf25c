"""Pause Python's garbage collector where many objects are made that stay. Used where parameters are taken up."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_paused"]


@contextmanager
def collector_paused() -> Iterator[None]:
    """Context, and decorator, in which reference cycles are not looked for; memory is freed as ever where nothing refers to it.

    Python looks through all objects whenever their number has grown by a quarter. For 10,000 parameters that is several times, and takes
    longer than to make the objects, none of which are garbage.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
