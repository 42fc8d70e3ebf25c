"""Import an object that a command line names as `package.module:name`, and the error for a missing package."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["MissingPackageError", "imported"]


class MissingPackageError(ImportError):
    """A package that only some commands need is not installed. The message says which to install."""


def imported(target: str) -> Any:
    """Import an object by its name `package.module:name`.

    >>> imported("math:pi")
    3.141592653589793

    Raises:
        ValueError: the object cannot be imported.
    """
    module_name, _, attributes = target.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for name in attributes.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{target!r} cannot be imported ({error}); give package.module:callable, importable from the current folder"
        ) from error
    return found
