"""Keys of a nested config, joined by dots. Used by trackers and reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["dotted_keys"]


def dotted_keys(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested config to its values by dotted key, in order.

    >>> dotted_keys({"lr": 0.1, "model": {"layers": 2, "data": {}}})
    {'lr': 0.1, 'model.layers': 2, 'model.data': {}}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        is_nested = isinstance(value, Mapping) and value
        found |= dotted_keys(value, f"{prefix}{key}.") if is_nested else {f"{prefix}{key}": value}
    return found
