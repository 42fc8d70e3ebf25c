"""The registry of destinations. To add one, write a file with a DESTINATION, and name it here."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from sharded_optim.trackers.destination import Destination

__all__ = ["MODULES", "check_installed", "check_options", "destination"]

MODULES = {
    "jsonl": "sharded_optim.trackers.json_lines",
    "tensorboard": "sharded_optim.trackers.tensorboard",
    "wandb": "sharded_optim.trackers.wandb",
    "mlflow": "sharded_optim.trackers.mlflow",
    "prometheus": "sharded_optim.trackers.prometheus",
}


def destination(name: str) -> Destination:
    """Return a destination by its name.

    Raises:
        ValueError: no destination has that name.
    """
    if name not in MODULES:
        raise ValueError(f"there is no tracker {name!r}{_nearest(name, MODULES)}")
    return import_module(MODULES[name]).DESTINATION


def check_installed(names: Iterable[str]) -> None:
    """Check that the clients of destinations are installed. Imports none of them.

    Raises:
        ImportError: a client is not installed. The message says what to install.
    """
    for name in names:
        found = destination(name)
        if not found.is_installed:
            raise ImportError(f"the tracker {name!r} needs the package {found.client}, which is not installed: pip install {found.install}")


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Check the names of a destination's options.

    Raises:
        ValueError: the destination has no option of that name.
    """
    parameters = inspect.signature(destination(name).opens).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"the tracker {name!r} has no option {option}={value!r}{_nearest(option, known)}")


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names) or 'none'}"
