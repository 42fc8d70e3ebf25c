"""The error of whatever the user can put right. Below everything else, so that all of `launch` can raise it."""

from __future__ import annotations

__all__ = ["ConfigError"]


class ConfigError(ValueError):
    """What the user can put right; shown without a traceback."""
