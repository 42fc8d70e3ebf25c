"""Drop Kahan compensations of parameters that were written to since the last step: they belong to values that are gone.

Masks of pruning, clamps and loaded weights write so. torch counts in-place writes to a tensor; writes through `param.data` are not counted.
Used by the optimizer, before a step and before its state is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from operator import attrgetter
from weakref import ref

from torch import Tensor, nn

from sharded_optim.step.state import local_of

__all__ = ["CompensationLog"]

Versions = tuple[list[Hashable], list[Hashable]]  # of parameters and of their compensations, in one order

_version: Callable[[Tensor], int] = attrgetter("_version")


def _versions_of(params: Sequence[Tensor], compensations: Sequence[Tensor]) -> Versions:
    """Return values that change when a parameter or a compensation is written to."""
    return _versions(params), _versions(compensations)


def _versions(tensors: Sequence[Tensor]) -> list[Hashable]:
    if set(map(type, tensors)) <= {Tensor, nn.Parameter}:
        return list(map(_version, tensors))
    # A DTensor counts what is written to it, its local tensor what a kernel writes; `model.to` gives it another local tensor.
    return [(each._version, id(local), local._version) for each, local in zip(tensors, map(local_of, tensors), strict=True)]


class _Left:
    """The versions of compensations that a step has updated together."""

    def __init__(self, compensations: Sequence[Tensor], freed: Callable[[int], object]) -> None:
        self.ids = list(map(id, compensations))
        self.rows = {key: row for row, key in enumerate(self.ids)}
        self.are_alive = True
        self.versions: Versions = ([], [])
        self._references = [ref(each, partial(self._forget, freed, key)) for each, key in zip(compensations, self.ids, strict=True)]

    def is_of(self, compensations: Sequence[Tensor]) -> bool:
        return self.are_alive and self.ids == list(map(id, compensations))

    def _forget(self, freed: Callable[[int], object], key: int, _: object) -> None:
        self.are_alive = False
        freed(key)


class CompensationLog:
    """The versions of parameters and of their compensations after the last step that updated them.

    A compensation that was written or replaced too, as when state is loaded, is taken as it is.
    """

    def __init__(self) -> None:
        self._left: dict[int, _Left] = {}  # by the compensation's id, until it is freed: it is held weakly

    def drop_stale(self, params: Sequence[Tensor], compensations: Sequence[Tensor]) -> None:
        """Zero the compensations of parameters that were written to since they were recorded; both are in the same order."""
        now = _versions_of(params, compensations)
        left = self._left.get(id(compensations[0])) if compensations else None
        if left is not None and left.versions == now and left.is_of(compensations):
            return
        for param_version, version, compensation in zip(*now, compensations, strict=True):
            key = id(compensation)
            if key in self._left:
                param_versions, versions = self._left[key].versions
                row = self._left[key].rows[key]
                if param_versions[row] != param_version and versions[row] == version:
                    compensation.zero_()

    def record(self, params: Sequence[Tensor], compensations: Sequence[Tensor]) -> None:
        """Record the versions after a step."""
        left = self._left.get(id(compensations[0])) if compensations else None
        if left is None or not left.is_of(compensations):
            left = _Left(compensations, self._forget)
            self._left.update(dict.fromkeys(left.ids, left))
        left.versions = _versions_of(params, compensations)

    def _forget(self, key: int) -> None:
        self._left.pop(key, None)
