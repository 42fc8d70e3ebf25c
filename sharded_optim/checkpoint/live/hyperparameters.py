"""The hyperparameters of a param group as checkpoints hold them: Python's own numbers, strings and containers.

Used by `LiveOptimizer`, by the plan of a load, and by `tools/divergence.py`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from numbers import Integral, Rational, Real
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["hyperparameters_of", "plain_hyperparameters"]


def hyperparameters_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a param group without its parameters and their names."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names") and not key.startswith("_ds_")}


def plain_hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the hyperparameters of a group to Python's own types, from those of NumPy, torch and config libraries."""
    return {key: _plain(value) for key, value in hyperparameters_of(group).items()}


def _plain(value: Any) -> Any:
    """Convert a tensor of one element, a scalar of NumPy, or an instance of a subclass of Python's types."""
    if (isinstance(value, Tensor) and value.numel() == 1) or isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(map(_plain, value))
    if isinstance(value, dict) and type(value) not in (OrderedDict, Counter, defaultdict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Integral):
        return value if isinstance(value, bool) else int(value)
    if isinstance(value, Real) and not isinstance(value, Rational):
        return float(value)
    return str.__str__(value) if isinstance(value, str) else value  # not str(value): an enum overrides it
