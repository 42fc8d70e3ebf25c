"""Layouts: which pieces of which tensors a rank holds, and which of them it owns.

A `Layout` is built once per set of parameters and process group: from this rank's pieces, or by `exchange.py` from those of all ranks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate
from operator import attrgetter, is_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim.formulas.verdict import NON_FINITE_PIECE
from sharded_optim.sharding.matrices import Matrices, MatrixPlan
from sharded_optim.sharding.segment import Segment
from sharded_optim.storage.devices import DeviceCache, send
from sharded_optim.storage.splitmix64 import GOLDEN, mix

__all__ = ["GRADIENT", "PARAMETER", "Layout", "LocalParam", "Piece", "Slots", "properties_of", "segments_of"]

PARAMETER, GRADIENT = "parameter", "gradient"  # roles of tensors in error messages; other roles are names of state


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Elements of one tensor of the model, and their position in the local tensor."""

    segment: Segment
    offset: int | None = None  # position in a contiguous 1-D local tensor; None: the piece is the whole local tensor, in any shape
    matrices: Matrices | None = None  # the tensor's matrices, if its algorithm needs them whole

    def of(self, local: Tensor) -> Tensor:
        """Return the elements of this piece in a local tensor, sharing memory."""
        return local if self.offset is None else local[self.offset : self.offset + self.segment.numel]


@dataclass(frozen=True, kw_only=True)
class LocalParam:
    """This rank's part of one parameter of the optimizer: a piece of one tensor, or of several tensors that are flattened together."""

    param: Tensor  # the object in the param group, which is also the key in the optimizer's state
    name: str  # for error messages
    pieces: tuple[Piece, ...]
    # (the parameter, its gradient or a state tensor; role for error messages) -> this rank's part of that tensor, sharing memory.
    # Raises ValueError when the tensor is not laid out like the parameter.
    local: Callable[[Tensor, str], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """The local parameters that are stepped together, and the list of all tensors of the model.

    Valid as long as the parameters have the properties in `properties_of`, and for the process group that built it.
    """

    local_params: tuple[LocalParam, ...]
    names: tuple[str, ...]  # all tensors of the whole model, in the same order on all ranks
    numels: tuple[int, ...]  # number of elements of each of these tensors
    slots: tuple[int, ...]  # for each piece of this rank: index of its tensor in `names`. Pieces are in the order of `local_params`
    owned: tuple[bool, ...]  # for each piece: whether this rank owns it; replicas have exactly one owner
    # For each piece: n - 1 if it is the first of its tensor's n non-empty pieces on all ranks, -1 for the other pieces, 0 for empty ones.
    # So a value that is the same for all pieces of a tensor, times this, adds up to 0 over the ranks.
    balance: tuple[int, ...]
    is_global: bool = False  # whether all ranks of a process group built it together
    # Their group; None: this process is alone. Held weakly: torch.distributed owns groups, and must be the one to end their threads.
    process_group_ref: weakref.ref[dist.ProcessGroup] | None = None
    matrices: tuple[MatrixPlan, ...] = ()  # how whole matrices are gathered; one plan per dtype
    partial: dict[int, Any] = field(default_factory=dict)  # by index of the local parameter: how its gradient is reduced, if it is Partial
    has_dtensors: bool = field(init=False)  # whether a parameter is neither a Tensor nor a Parameter, but, say, a DTensor
    device: torch.device = field(init=False)  # of the collective of a step: the first parameter's when this was built
    _described: tuple[list[Any], ...] = field(init=False)  # see `properties_of`

    def __post_init__(self) -> None:
        object.__setattr__(self, "_described", properties_of(self.params))
        object.__setattr__(self, "has_dtensors", bool(self._described[-1]))
        object.__setattr__(self, "device", self.params[0].device if self.params else torch.device("cpu"))

    @cached_property
    def params(self) -> list[Tensor]:
        """The parameter of each local parameter."""
        return [entry.param for entry in self.local_params]

    @cached_property
    def first_piece(self) -> list[int]:
        """Index of the first piece of each local parameter, among all pieces."""
        return [0, *accumulate(len(entry.pieces) for entry in self.local_params)][:-1]

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """Process group of the ranks that built this layout together; None if this process is alone, or the group is gone."""
        return None if self.process_group_ref is None else self.process_group_ref()

    @property
    def described_by_name(self) -> str:
        """A short list of the model's tensors for error messages."""
        if not self.names:
            return "nothing"
        others = len(self.names) - 1
        return f"{self.names[0]!r}{f' and {others} other tensor' if others else ''}{'s' if others > 1 else ''}"

    def tensor_numels(self, device: torch.device) -> Tensor:
        """Return the number of elements of each tensor, at least 1: float64 (tensors,) on the device, cached."""
        if device not in self._numels_on:
            self._numels_on[device] = send(torch.tensor(self.numels, dtype=torch.float64, device="cpu").clamp(min=1), device)
        return self._numels_on[device]

    @cached_property
    def _numels_on(self) -> dict[torch.device, Tensor]:
        return {}

    @cached_property
    def sent(self) -> DeviceCache[Tensor]:
        """Cache of the part of this rank's vector (see `step/agreement.py`) that does not change from step to step."""
        return DeviceCache()

    @cached_property
    def _segments(self) -> list[Segment]:
        return segments_of(self.local_params)

    def places(self, indices: Sequence[int], device: torch.device) -> Slots:
        """Return the positions in this layout of the pieces with these indices, as tensors for a step."""
        tensor = partial(torch.tensor, dtype=torch.int64, device="cpu")
        slots, balance = tensor([self.slots[index] for index in indices]), tensor([self.balance[index] for index in indices])
        is_first = tensor([self._segments[index].numel > 0 and self.balance[index] >= 0 for index in indices])
        counted = [[self.owned[index] for index in indices], [NON_FINITE_PIECE] * len(indices)]
        return Slots(
            indices=tensor(indices),
            slots=send(slots, device),
            counted=send(tensor(counted), device),
            first_slots=slots.where(is_first > 0, -1),
            weights=balance * (mix((slots + 1) * GOLDEN) | 1),  # the hash is made odd, so that multiplying by it loses no bit
        )

    @classmethod
    def of_rank(cls, local_params: Sequence[LocalParam]) -> Layout:
        """Build a layout of this rank alone, for algorithms that need nothing from other ranks. No communication."""
        segments = segments_of(local_params)
        return cls(
            local_params=tuple(local_params),
            names=tuple(segment.name for segment in segments),
            numels=tuple(segment.tensor_numel for segment in segments),
            slots=tuple(range(len(segments))),
            owned=(True,) * len(segments),
            balance=(0,) * len(segments),
        )

    def is_global_over(self, process_group: dist.ProcessGroup | None) -> bool:
        """Return whether the ranks of this process group built this layout together; None stands for this process alone."""
        if self.process_group_ref is None or process_group is None:
            return self.is_global and self.process_group_ref is process_group
        return self.process_group_ref() is process_group

    def is_of(self, params: Sequence[Tensor]) -> bool:
        """Return whether this layout was built from these parameter objects."""
        return len(params) == len(self.local_params) and all(map(is_, params, self.params))

    def describes(self, params: Sequence[Tensor]) -> bool:
        """Return whether this layout was built from these parameters, which still have the same properties.

        Wrappers replace parameters, and `model.to()` may replace a parameter's memory while the object stays the same.
        """
        if not self.is_of(params) or properties_of(params) != self._described:
            return False
        return not params or params[0].device == self.device


_shape: Callable[[Tensor], torch.Size] = attrgetter("shape")
_dtype: Callable[[Tensor], torch.dtype] = attrgetter("dtype")


def properties_of(params: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """Return the properties of parameters on which a layout depends, as one list per property: that compares faster.

    Devices are not among them: a parameter that moves to another device has another address, for which kernel calls are rebuilt.
    (`Layout.describes` compares the first parameter's device, on which ranks agree.)
    """
    types = list(map(type, params))
    is_plain = set(types) <= {Tensor, torch.nn.Parameter}
    specs = [] if is_plain else [getattr(param, "_spec", None) for param in params]  # of DTensors: mesh, placements, shape
    return types, list(map(_shape, params)), list(map(_dtype, params)), specs


def segments_of(local_params: Sequence[LocalParam]) -> list[Segment]:
    """Return the segments of all pieces of local parameters."""
    return [piece.segment for entry in local_params for piece in entry.pieces]


@dataclass(frozen=True, kw_only=True, eq=False)
class Slots:
    """Positions of some of this rank's pieces in a layout, as tensors for a step."""

    indices: Tensor  # int64 (n,), index of each piece among all of this rank's pieces
    slots: Tensor  # int64 (n,) on the device, index of its tensor in `Layout.names`
    counted: Tensor  # int64 (2, n) on the device: 1 where this rank owns the piece, else 0, as replicas count once; NON_FINITE_PIECE
    first_slots: Tensor  # int64 (n,): `slots` where the piece is the first non-empty piece of its tensor; else -1
    weights: Tensor  # int64 (n,): a hash of the slot, times `Layout.balance`; sums weighted by it are 0 where ranks agree
