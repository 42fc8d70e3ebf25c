"""Hyperparameters of a param group, checked and converted once, and again when one of them changes.

Schedulers and users write to param groups at any time. The values are compared by identity in every step, which is fast; only a group that
has changed, or has values that may change in place (tensors, lists), is checked, converted and hashed again. Used by `GroupedOptimizer`,
which makes these, and by kernel calls.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection
from operator import is_
from typing import Any

import torch

from sharded_optim.formulas.hyperparameters import comparable
from sharded_optim.step.coefficients import host_numbers

__all__ = ["GroupValues"]

MUTABLE = object()  # stands for a value that may change, though it stays the same object
IMMUTABLE = (bool, int, float, str, type(None), torch.dtype)
NOT_VALUES = ("params", "param_names")  # keys of a param group that are no hyperparameters


class GroupValues:
    """The hyperparameters of one param group, as they are in this step.

    Attributes:
        group: whose they are; held, so that its id stays its own.
        numbers: the hyperparameters, as Python numbers where the host knows them; lr may be a tensor of a device.
    """

    def __init__(
        self,
        group: dict[str, Any],
        state_dtype: torch.dtype | str,
        compared: Collection[str],  # names of hyperparameters that must be the same on all ranks
    ) -> None:
        self.group = group
        self.numbers = host_numbers(_values_in(group))
        self._state_dtype = state_dtype
        self._seen = {name: value if _is_immutable(value) else MUTABLE for name, value in _values_in(group).items()}
        self._compared = [(name, comparable(group[name])) for name in sorted(compared & group.keys())]
        self._options: Any = None
        self._hash = 0  # of what is compared, and of these options

    def are_of(self, group: dict[str, Any], state_dtype: torch.dtype | str) -> bool:
        """Return whether this is the group and these are certainly its values."""
        values = _values_in(group)
        return (
            group is self.group
            and state_dtype == self._state_dtype
            and values.keys() == self._seen.keys()
            and all(map(is_, values.values(), map(self._seen.get, values)))
        )

    def unchanged(self, group: dict[str, Any]) -> set[str]:
        """Names of the values of a group that are certainly the same as these."""
        return {name for name, value in _values_in(group).items() if value is self._seen.get(name, MUTABLE)}

    def key(self, options: Any, step: float) -> int:
        """Hash hyperparameters, options and step to 24 bits, which ranks compare."""
        if options != self._options:
            self._options, self._hash = options, zlib.crc32(repr((self._compared, options)).encode())
        return zlib.crc32(repr(step).encode(), self._hash) & 0xFFFFFF


def _values_in(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in NOT_VALUES}


def _is_immutable(value: Any) -> bool:
    return isinstance(value, IMMUTABLE) or (type(value) is tuple and all(map(_is_immutable, value)))
