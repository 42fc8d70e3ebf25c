"""Layouts: which pieces of which tensors a rank holds, and which of them it owns.

A `Layout` is built once per set of parameters and process group: of this rank alone, or by `exchange.py` of what all ranks hold.
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

PARAMETER, GRADIENT = "parameter", "gradient"  # roles of tensors, besides state


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Elements of one tensor of the model, and where they lie in the local tensor that holds them."""

    segment: Segment
    offset: int | None = None  # of the first, in a contiguous 1-D local tensor; None: they are all of the local tensor, in any shape
    matrices: Matrices | None = None  # that the tensor is, where its algorithm needs them whole

    def of(self, local: Tensor) -> Tensor:
        """The piece's elements of a local tensor, sharing memory."""
        return local if self.offset is None else local[self.offset : self.offset + self.segment.numel]


@dataclass(frozen=True, kw_only=True)
class LocalParam:
    """This rank's part of one parameter of the optimizer: a piece of a tensor, or pieces of several if a wrapper flattens."""

    param: Tensor  # as the param group holds it; the key of its optimizer state
    name: str  # for error messages
    pieces: tuple[Piece, ...]
    # (param, gradient or state tensor, its role for error messages) -> this rank's part, sharing memory.
    # Raises ValueError when the tensor is not laid out like the parameter.
    local: Callable[[Tensor, str], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """The local parameters that are stepped together, and the list of all tensors of the model.

    It holds for these parameters as they were described, and for this process group.
    """

    local_params: tuple[LocalParam, ...]
    names: tuple[str, ...]  # every tensor of the whole model, on all ranks in the same order
    numels: tuple[int, ...]  # of these tensors
    slots: tuple[int, ...]  # index into `names` of each piece of the local parameters, one parameter after the other
    owned: tuple[bool, ...]  # whether this rank owns the piece; replicas have exactly one owner
    # Of each piece: n - 1 for the first of all n pieces, of all ranks, of a tensor, -1 for the others, and 0 for those without an element.
    # So a value that is the same for all pieces of a tensor adds up to 0 over ranks.
    balance: tuple[int, ...]
    is_global: bool = False  # whether it was made by all ranks of a process group together
    # Of these ranks; None: this process is alone. Held weakly: torch.distributed owns groups, and must be the one to end their threads.
    process_group_ref: weakref.ref[dist.ProcessGroup] | None = None
    matrices: tuple[MatrixPlan, ...] = ()  # how whole matrices are gathered: a plan for each dtype
    partial: dict[int, Any] = field(default_factory=dict)  # by local parameter: how its gradient is reduced, where that comes Partial
    has_dtensors: bool = field(init=False)  # whether any of the parameters is a tensor of a subclass, as a DTensor is
    device: torch.device = field(init=False)  # on which ranks agree: that of the first parameter when this was made
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
        """The tensors of the model, in words for error messages."""
        if not self.names:
            return "nothing"
        others = len(self.names) - 1
        return f"{self.names[0]!r}{f' and {others} other tensor' if others else ''}{'s' if others > 1 else ''}"

    def tensor_numels(self, device: torch.device) -> Tensor:
        """Number of elements of each tensor, but at least 1: float64 (tensors,) on the device, cached."""
        if device not in self._numels_on:
            self._numels_on[device] = send(torch.tensor(self.numels, dtype=torch.float64, device="cpu").clamp(min=1), device)
        return self._numels_on[device]

    @cached_property
    def _numels_on(self) -> dict[torch.device, Tensor]:
        return {}

    @cached_property
    def sent(self) -> DeviceCache[Tensor]:
        """Cache of what does not change from step to step in this rank's vector."""
        return DeviceCache()

    @cached_property
    def _segments(self) -> list[Segment]:
        return segments_of(self.local_params)

    def places(self, indices: Sequence[int], device: torch.device) -> Slots:
        """Return the positions of some of the pieces."""
        tensor = partial(torch.tensor, dtype=torch.int64, device="cpu")
        slots, balance = tensor([self.slots[index] for index in indices]), tensor([self.balance[index] for index in indices])
        is_first = tensor([self._segments[index].numel > 0 and self.balance[index] >= 0 for index in indices])
        counted = [[self.owned[index] for index in indices], [NON_FINITE_PIECE] * len(indices)]
        return Slots(
            indices=tensor(indices),
            slots=send(slots, device),
            counted=send(tensor(counted), device),
            first_slots=slots.where(is_first > 0, -1),
            weights=balance * (mix((slots + 1) * GOLDEN) | 1),  # odd, so that multiplying loses no bit
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
        """Return whether this layout was built from these parameters, and they still have the same properties.

        Wrappers replace parameters, and `model.to()` may replace what is behind a parameter that stays the same object.
        """
        if not self.is_of(params) or properties_of(params) != self._described:
            return False
        return not params or params[0].device == self.device


_shape: Callable[[Tensor], torch.Size] = attrgetter("shape")
_dtype: Callable[[Tensor], torch.dtype] = attrgetter("dtype")


def properties_of(params: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """Return the properties of parameters that a layout depends on, column by column: that compares faster than a row for each.

    Their devices are not among them, but for the first one's, on which ranks agree: on another device parameters have another address, and
    kernel calls are made anew.
    """
    types = list(map(type, params))
    is_plain = set(types) <= {Tensor, torch.nn.Parameter}
    specs = [] if is_plain else [getattr(param, "_spec", None) for param in params]  # of DTensors: mesh, placements, shape
    return types, list(map(_shape, params)), list(map(_dtype, params)), specs


def segments_of(local_params: Sequence[LocalParam]) -> list[Segment]:
    """Segments of all pieces of these local parameters."""
    return [piece.segment for entry in local_params for piece in entry.pieces]


@dataclass(frozen=True, kw_only=True, eq=False)
class Slots:
    """Positions of some pieces in a layout."""

    indices: Tensor  # int64 (n,), among all pieces
    slots: Tensor  # int64 (n,) on the device, into `names`
    counted: Tensor  # int64 (2, n) on the device: 1 where this rank owns the piece, as replicas count once; and NON_FINITE_PIECE
    first_slots: Tensor  # int64 (n,), into `names` where a piece is the first of those of its tensor that have an element; else -1
    weights: Tensor  # int64 (n,), random for each tensor, times `Layout.balance`: of the hashes whose sum is 0 where ranks agree
