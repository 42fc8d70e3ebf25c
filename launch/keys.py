"""Read files of keys and values, and find dotted keys in them. Used for the job's config and for the DeepSpeed config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from launch.errors import ConfigError, nearest

__all__ = ["find_section", "read"]


def read(path: Path, parse: Callable[[str], Any], name: str) -> dict[str, Any]:
    """Read a file of keys and values.

    Args:
        parse: parses the file's text, as YAML or JSON.
        name: the name of the file in messages.

    Raises:
        ConfigError: there is no such file, it cannot be parsed, or its content is not keys and values.
    """
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        others = sorted(other.name for other in path.parent.glob("*") if other.suffix in (".yaml", ".json"))
        raise ConfigError(f"{name}: there is no such file{nearest(path.name, others)}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{name} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{name} must hold keys and values, got {values!r}")
    return values


def find_section(values: dict[str, Any], key: str, source: str) -> tuple[dict[str, Any], str]:
    """Return the dict that holds a dotted key, created if it is missing, and the last part of the key.

    Args:
        source: the origin of the key, for messages.

    Raises:
        ConfigError: a part of the key before the last has a value that is no dict.
    """
    *parents, leaf = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: {parent} has no keys of its own, it is {values!r}")
    return values, leaf
