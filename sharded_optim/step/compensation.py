"""Zero the Kahan compensations of parameters that were modified since the last step: they belong to values that no longer exist.

Pruning masks, clamps and loaded weights modify parameters. torch counts in-place writes to a tensor, but not writes through `param.data`.
Used by the optimizer before a step and before it saves its state.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from operator import attrgetter
from weakref import ref

from torch import Tensor, nn

from sharded_optim.step.state import local_of

__all__ = ["CompensationLog"]

Versions = tuple[list[Hashable], list[Hashable]]  # (versions of parameters, versions of their compensations), in the same order

_version: Callable[[Tensor], int] = attrgetter("_version")


def _versions_of(params: Sequence[Tensor], compensations: Sequence[Tensor]) -> Versions:
    """Return the versions of parameters and compensations: values that change when the tensor is written to."""
    return _versions(params), _versions(compensations)


def _versions(tensors: Sequence[Tensor]) -> list[Hashable]:
    if set(map(type, tensors)) <= {Tensor, nn.Parameter}:
        return list(map(_version, tensors))
    # A DTensor counts writes through itself, its local tensor counts writes by kernels; `model.to` replaces the local tensor.
    return [(each._version, id(local), local._version) for each, local in zip(tensors, map(local_of, tensors), strict=True)]


class _VersionRecord:
    """The versions of the compensations that one step updated together, and of their parameters."""

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

    A compensation that was itself written or replaced, as when state is loaded, is left as it is.
    """

    def __init__(self) -> None:
        # Keyed by id(compensation). Entries hold weak references, and are removed when the compensation is freed.
        self._recorded: dict[int, _VersionRecord] = {}

    def drop_stale(self, params: Sequence[Tensor], compensations: Sequence[Tensor]) -> None:
        """Zero in place the compensations whose parameter was written to since the last `record`; params and compensations correspond."""
        now = _versions_of(params, compensations)
        recorded = self._recorded.get(id(compensations[0])) if compensations else None
        if recorded is not None and recorded.versions == now and recorded.is_of(compensations):
            return
        for param_version, version, compensation in zip(*now, compensations, strict=True):
            key = id(compensation)
            if key in self._recorded:
                param_versions, versions = self._recorded[key].versions
                row = self._recorded[key].rows[key]
                if param_versions[row] != param_version and versions[row] == version:
                    compensation.zero_()

    def record(self, params: Sequence[Tensor], compensations: Sequence[Tensor]) -> None:
        """Record the versions after a step."""
        recorded = self._recorded.get(id(compensations[0])) if compensations else None
        if recorded is None or not recorded.is_of(compensations):
            recorded = _VersionRecord(compensations, self._forget)
            self._recorded.update(dict.fromkeys(recorded.ids, recorded))
        recorded.versions = _versions_of(params, compensations)

    def _forget(self, key: int) -> None:
        self._recorded.pop(key, None)
