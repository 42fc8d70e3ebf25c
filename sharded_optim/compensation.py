"""Drops Kahan compensations of parameters that were written since the last step: what a step added is of values that are gone.

Masks of pruning, clamps and loaded weights write so. torch counts in-place writes to a tensor; writes through `param.data` are not counted.
Used by the optimizer, before a step and before its state is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter

from torch import Tensor, nn

from sharded_optim.state import local_of

__all__ = ["CompensationLog"]

_version: Callable[[Tensor], int] = attrgetter("_version")


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was written to. A DTensor counts what is written to it, its local tensor what a kernel writes."""
    versions = list(map(_version, tensors))
    if set(map(type, tensors)) <= {Tensor, nn.Parameter}:
        return versions
    locals_ = map(local_of, tensors)
    return [version if local is each else version + local._version for version, each, local in zip(versions, tensors, locals_, strict=True)]


class CompensationLog:
    """How often parameters and their compensations had been written to after the last step that updated them.

    A compensation that was written or replaced too, as when state is loaded, is taken as it is.
    """

    def __init__(self) -> None:
        self._versions: dict[int, tuple[int, int]] = {}  # by the compensation's id: of the parameter, of the compensation
        self._compensations: dict[int, Tensor] = {}  # by id, so that ids are not reused

    def __len__(self) -> int:
        return len(self._compensations)

    def keep_only(self, compensations: Iterable[Tensor]) -> None:
        """Forget all others."""
        self._compensations = {id(each): each for each in compensations if id(each) in self._versions}
        self._versions = {key: self._versions[key] for key in self._compensations}

    def drop_stale(self, params: Sequence[Tensor], compensations: Sequence[Tensor]) -> None:
        """Zero the compensations of parameters that were written since; both are in one order."""
        now = list(zip(_versions(params), _versions(compensations), strict=True))
        known = list(map(self._versions.get, map(id, compensations)))
        if known == now:
            return
        for before, (param_version, version), compensation in zip(known, now, compensations, strict=True):
            if before is not None and before[0] != param_version and before[1] == version:
                compensation.zero_()

    def record(self, params: Sequence[Tensor], compensations: Sequence[Tensor]) -> None:
        """Remember what a step has left."""
        ids = list(map(id, compensations))
        self._versions.update(zip(ids, zip(_versions(params), _versions(compensations), strict=True), strict=True))
        if len(self._compensations) < len(self._versions):
            self._compensations.update(zip(ids, compensations, strict=True))
