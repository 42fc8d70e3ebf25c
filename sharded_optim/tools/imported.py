"""Import what a command line names as `package.module:name`, and name a package that is missing."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["MissingPackageError", "imported"]


class MissingPackageError(ImportError):
    """A package that only some commands need is not installed. The message says which to install."""


def imported(target: str) -> Any:
    """Return the object of that name.

    >>> imported("math:pi")
    3.141592653589793

    Raises:
        ValueError: it cannot be imported.
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
