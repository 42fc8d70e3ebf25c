"""Hyperparameters of a param group, checked and converted once, and again when one of them changes.

Schedulers and users write to param groups at any time. The values are compared by identity in every step, which is fast; only a group that
has changed is checked, converted and hashed again. Used by `GroupedOptimizer`, which makes these, and by kernel calls.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from operator import is_
from typing import Any

import torch

from sharded_optim.formulas.hyperparameters import comparable
from sharded_optim.step.coefficients import host_numbers

__all__ = ["ABSENT", "GroupValues"]

ABSENT = object()  # stands for a hyperparameter that a group lacks
MUTABLE = object()  # for one that may have another value, though it is the same object
IMMUTABLE = (bool, int, float, str, type(None), torch.dtype)


class GroupValues:
    """The hyperparameters of one param group, as they are in this step.

    Attributes:
        group: which; held, so that its id stays its own.
        numbers: the hyperparameters, as Python numbers where the host knows them; of what a device knows, lr alone, the tensor.
        learns_reference_lr: whether the reference learning rate of weight decay is the largest lr so far.
    """

    def __init__(
        self,
        group: dict[str, Any],
        values: Mapping[str, Any],  # by name, what they follow from: it must stay the same objects
        compared: Collection[str],  # names of hyperparameters that must be the same on all ranks
    ) -> None:
        self.group = group
        self.numbers = host_numbers(group)
        self.learns_reference_lr = group["learns_reference_lr"]
        self._seen = {name: value if _is_immutable(value) else MUTABLE for name, value in values.items()}
        self._compared = [(name, comparable(group[name])) for name in sorted(compared & group.keys())]
        self._options: Any = None
        self._hash = 0  # of what is compared, and of these options

    def are_of(self, group: dict[str, Any], values: Mapping[str, Any]) -> bool:
        """Return whether this is the group and these are certainly its values."""
        return group is self.group and all(map(is_, values.values(), self._seen.values()))

    def unchanged(self, values: Mapping[str, Any]) -> set[str]:
        """Names of the values that are certainly unchanged."""
        return {name for name, value in values.items() if value is self._seen[name]}

    def learn_reference_lr(self) -> None:
        """Keep the largest learning rate so far as the reference, if the group was given none."""
        if self.learns_reference_lr:
            self.group["reference_lr"] = self.numbers["reference_lr"] = max(self.group["reference_lr"], float(self.numbers["lr"]))

    def key(self, options: Any, step: float) -> int:
        """Hash hyperparameters, options and step to 24 bits, which ranks compare."""
        if options != self._options:
            self._options, self._hash = options, zlib.crc32(repr((self._compared, options)).encode())
        return zlib.crc32(repr(step).encode(), self._hash) & 0xFFFFFF


def _is_immutable(value: Any) -> bool:
    return value is ABSENT or isinstance(value, IMMUTABLE) or (type(value) is tuple and all(map(_is_immutable, value)))
