"""The error of whatever the user can put right, and what helps to. Below everything else, so that all of `launch` can raise it."""

from __future__ import annotations

import difflib

__all__ = ["ConfigError", "nearest"]


class ConfigError(ValueError):
    """What the user can put right; shown without a traceback."""


def nearest(name: str, names: list[str]) -> str:
    """`; did you mean ...?`, or nothing if no name is near."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
