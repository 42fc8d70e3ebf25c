"""The error for mistakes that the user can correct, and suggestions for its messages. Imports no other module of `launch`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["ConfigError", "nearest"]


class ConfigError(ValueError):
    """A mistake that the user can correct; shown without a traceback."""


def nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """Return `; did you mean ...?` with the most similar name, shown after `prefix`, or "" if none is similar."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
