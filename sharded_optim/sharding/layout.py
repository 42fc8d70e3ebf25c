"""What every rank holds, and who owns it.

A `Layout` is built once per set of parameters and process group. With a process group it is a collective: all ranks exchange their
segments, refuse together what does not fit together, and choose for each distinct piece of a tensor the one rank that owns it.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from operator import attrgetter, is_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim.devices import send
from sharded_optim.ranks import join_messages, naming_missing_ranks
from sharded_optim.segment import Segment, find_tiling_error

__all__ = ["GRADIENT", "PARAMETER", "Layout", "LocalParam", "Piece", "Places"]

PARAMETER, GRADIENT = "parameter", "gradient"  # roles of tensors, besides state

GRADIENTS_DIFFER = 1e-2  # relative difference of norms at which gradients are not the same up to rounding
HASHED_AT_ONCE = 2**20  # elements, each of which takes 24 bytes for a moment
NOISE = 1e-4  # of the largest gradient norm: a gradient below may be rounding noise alone


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Elements of one tensor of the model, and where they lie in the local tensor that holds them."""

    segment: Segment
    offset: int | None = None  # of the first, in a contiguous 1-D local tensor; None: they are all of the local tensor, in any shape

    def of(self, local: Tensor) -> Tensor:
        """The piece's elements of a local tensor, sharing memory."""
        return local if self.offset is None else local[self.offset : self.offset + self.segment.numel]


@dataclass(frozen=True, kw_only=True)
class LocalParam:
    """What this rank holds of one parameter of the optimizer: a piece of a tensor, or, where a wrapper flattens, pieces of several."""

    param: Tensor  # as the param group holds it; the key of its optimizer state
    name: str  # for error messages
    pieces: tuple[Piece, ...]
    # (param, gradient or state tensor, its role for error messages) -> this rank's part, sharing memory.
    # Raises ValueError when the tensor is not laid out like the parameter.
    local: Callable[[Tensor, str], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """All local parameters of an optimizer, or those it steps together, and the model-wide list of tensors.

    It holds for these parameters as they were described, and for this process group.
    """

    local_params: tuple[LocalParam, ...]
    names: tuple[str, ...]  # every tensor of the whole model, on all ranks in the same order
    numels: tuple[int, ...]  # of these tensors
    slots: tuple[int, ...]  # index into `names` of each piece of the local parameters, one parameter after the other
    owned: tuple[bool, ...]  # whether this rank is the one that speaks for the piece; replicas have exactly one owner
    is_global: bool = False  # whether it was made by all ranks of a process group together
    # Of these ranks; None: this process is alone. Held weakly: torch.distributed owns groups, and must be the one to end their threads.
    process_group: weakref.ref[dist.ProcessGroup] | None = None
    partial: dict[int, Any] = field(default_factory=dict)  # by local parameter: the placements of its gradient, where that comes Partial
    device: torch.device = field(init=False)  # on which ranks agree: that of the first parameter when this was made
    _described: tuple[list[Any], ...] = field(init=False)  # see `_properties`

    def __post_init__(self) -> None:
        object.__setattr__(self, "_described", _properties(self.params))
        object.__setattr__(self, "device", self.params[0].device if self.params else torch.device("cpu"))

    @cached_property
    def params(self) -> list[Tensor]:
        """Of each local parameter."""
        return [entry.param for entry in self.local_params]

    @cached_property
    def first_piece(self) -> list[int]:
        """Where the pieces of each local parameter begin among all."""
        return [0, *accumulate(len(entry.pieces) for entry in self.local_params)][:-1]

    @property
    def has_dtensors(self) -> bool:
        """Whether any of the parameters is a DTensor."""
        return bool(self._described[-1])

    @property
    def described_by_name(self) -> str:
        """For error messages."""
        if not self.names:
            return "nothing"
        others = len(self.names) - 1
        return f"{self.names[0]!r}{f' and {others} other tensor' if others else ''}{'s' if others > 1 else ''}"

    def tensor_numels(self, device: torch.device) -> Tensor:
        """`numels`, but 1 where there is nothing: float64 (tensors,), kept on the device."""
        if device not in self._numels_on:
            self._numels_on[device] = send(torch.tensor(self.numels, dtype=torch.float64, device="cpu").clamp(min=1), device)
        return self._numels_on[device]

    @cached_property
    def _numels_on(self) -> dict[torch.device, Tensor]:
        return {}

    @cached_property
    def sent(self) -> list[tuple[Tensor, Tensor]]:
        """The last vector of a step and its copy on the device, before ranks added anything."""
        return []

    @cached_property
    def slot_indices(self) -> Tensor:
        """`slots`: int64 (pieces,)."""
        return torch.tensor(self.slots, dtype=torch.int64, device="cpu")

    @cached_property
    def held(self) -> Tensor:
        """Whether each has an element: bool (pieces,)."""
        return torch.tensor([segment.numel > 0 for segment in _segments(self.local_params)], dtype=torch.bool, device="cpu")

    def places(self, indices: Sequence[int], device: torch.device) -> Places:
        """Where some of the pieces stand in the list of tensors."""
        at = torch.tensor(indices, dtype=torch.int64, device="cpu")
        slots, held = self.slot_indices[at], self.held[at]
        return Places(
            indices=at,
            slots=send(slots, device),
            counted=send(
                torch.tensor([[self.owned[index] for index in indices], [True] * len(indices)], dtype=torch.int64, device="cpu"), device
            ),
            held=None if held.all() else held,
            held_slots=slots[held],
        )

    @classmethod
    def of_rank(cls, local_params: Sequence[LocalParam]) -> Layout:
        """What this rank holds, for algorithms that need nothing from other ranks. No communication."""
        segments = _segments(local_params)
        return cls(
            local_params=tuple(local_params),
            names=tuple(segment.name for segment in segments),
            numels=tuple(segment.tensor_numel for segment in segments),
            slots=tuple(range(len(segments))),
            owned=(True,) * len(segments),
        )

    @classmethod
    def of_group(
        cls,
        describe: Callable[[], Sequence[LocalParam]],
        process_group: dist.ProcessGroup | None,
        *,
        compares_values: Callable[[Tensor], bool],
    ) -> Layout:
        """Put together what all ranks of `process_group` hold (None: this process is all there is). A collective.

        Args:
            describe: describes this rank's parameters; what it raises on one rank is raised on all.
            compares_values: whether replicas of a parameter must have the same values, bit for bit; else only gradients that are alike.

        Raises:
            ValueError: on every rank alike, when ranks disagree about a tensor, their pieces do not tile it, or pieces that should be
                replicas differ.
        """
        local_params: Sequence[LocalParam] = ()
        rows: list[_Row] | str
        try:
            local_params = describe()
            alone = process_group is None
            rows = [row for entry in local_params for row in _Row.of(entry, alone=alone, compare_values=compares_values(entry.param))]
        except Exception as error:  # the other ranks must hear of it before this one raises
            rows = str(error) if isinstance(error, ValueError) else repr(error)
        rank, tables = 0, [rows]
        if process_group is not None:
            rank = dist.get_rank(process_group)
            tables: list[Any] = [None] * dist.get_world_size(process_group)
            with naming_missing_ranks(process_group, "what each rank holds, which is exchanged before the first step of these parameters"):
                dist.all_gather_object(tables, rows, group=process_group)
        failures = [table if isinstance(table, str) else None for table in tables]
        if any(failures):
            raise ValueError(join_messages(failures) if process_group else failures[0])

        largest_norm = max((row.grad_norm or 0.0 for table in tables for row in table), default=0.0)
        holders: dict[str, list[tuple[int, _Row]]] = defaultdict(list)
        for holder, table in enumerate(tables):
            for row in table:
                holders[row.segment.name].append((holder, row))
        owner: dict[Segment, int] = {}
        for name, pieces in holders.items():
            _check_agreement(name, pieces, largest_norm)
            for holder, row in pieces:
                owner.setdefault(row.segment, holder)
        partial_of = {row.segment.name: row.partial for table in tables for row in table if row.partial is not None}
        names = tuple(holders)
        index = {name: slot for slot, name in enumerate(names)}
        return cls(
            local_params=tuple(local_params),
            names=names,
            numels=tuple(pieces[0][1].segment.tensor_numel for pieces in holders.values()),
            slots=tuple(index[segment.name] for segment in _segments(local_params)),
            owned=tuple(owner[segment] == rank for segment in _segments(local_params)),
            is_global=True,
            partial={
                row: partial_of[piece.segment.name]
                for row, entry in enumerate(local_params)
                for piece in entry.pieces
                if piece.segment.name in partial_of
            },
            process_group=None if process_group is None else weakref.ref(process_group),
        )

    def is_global_over(self, process_group: dist.ProcessGroup | None) -> bool:
        """Whether it was made by all ranks of this process group together; None: by this process alone."""
        if self.process_group is None or process_group is None:
            return self.is_global and self.process_group is process_group
        return self.process_group() is process_group

    def is_of(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the parameters that this layout was built from, whatever is behind them now."""
        return len(params) == len(self.local_params) and all(map(is_, params, self.params))

    def describes(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the parameters that this layout was built from, as they were then.

        Wrappers replace parameters, and `model.to()` may replace what is behind a parameter that stays the same object.
        """
        return self.is_of(params) and _properties(params) == self._described and all(p.device == self.device for p in params[:1])


_shape: Callable[[Tensor], torch.Size] = attrgetter("shape")
_dtype: Callable[[Tensor], torch.dtype] = attrgetter("dtype")


def _properties(params: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """The properties of parameters that a layout depends on. Compared in every step: a column of all is faster than a row of each.

    Their devices are not among them, but for the first one's, on which ranks agree: on another device parameters have another address, and
    kernel calls are made anew.
    """
    types = list(map(type, params))
    is_plain = set(types) <= {Tensor, torch.nn.Parameter}
    specs = [] if is_plain else [getattr(param, "_spec", None) for param in params]  # of DTensors: mesh, placements, shape
    return types, list(map(_shape, params)), list(map(_dtype, params)), specs


def _segments(local_params: Sequence[LocalParam]) -> list[Segment]:
    """Of all their pieces."""
    return [piece.segment for entry in local_params for piece in entry.pieces]


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where some pieces stand in a layout."""

    indices: Tensor  # int64 (n,), among all pieces
    slots: Tensor  # int64 (n,) on the device, into `names`
    counted: Tensor  # int64 (2, n) on the device: 1 where this rank speaks for the piece, as replicas are not counted twice; and 1
    held: Tensor | None  # bool (n,), whether each has an element; None: all have
    held_slots: Tensor  # int64, into `names`, of those that have


@dataclass(frozen=True, kw_only=True)
class _Row:
    """What a rank tells the others about one of its pieces."""

    segment: Segment
    dtype: str
    fingerprint: int | None = None  # of the values
    grad_norm: float | None = None  # None without a gradient, or a finite one
    partial: Any = None  # placements of the gradient, where it is a DTensor that is yet to be reduced

    @classmethod
    def of(cls, entry: LocalParam, *, alone: bool, compare_values: bool) -> Iterator[_Row]:
        """One for each piece."""
        dtype = str(entry.param.dtype)
        param = entry.local(entry.param, PARAMETER).detach()
        grad = None if alone else entry.param.grad
        placements = getattr(grad, "placements", ())
        partial = tuple(placements) if any(placement.is_partial() for placement in placements) else None
        grad = None if grad is None or partial is not None else entry.local(grad, GRADIENT)
        for piece in entry.pieces:
            fingerprint = grad_norm = None
            if piece.segment.numel and not alone:
                norm = math.nan if grad is None else float(torch.linalg.vector_norm(piece.of(grad), dtype=torch.float32))
                grad_norm = norm if math.isfinite(norm) else None
                fingerprint = _fingerprint(piece.of(param)) if compare_values else None
            yield cls(segment=piece.segment, dtype=dtype, fingerprint=fingerprint, grad_norm=grad_norm, partial=partial)


def _check_agreement(name: str, pieces: list[tuple[int, _Row]], largest_norm: float) -> None:
    first_rank, first = pieces[0]
    replicas: dict[Segment, tuple[int, _Row]] = {}
    for rank, row in pieces:
        if row.segment.shape != first.segment.shape or row.dtype != first.dtype:
            raise ValueError(
                f"ranks disagree about {name!r}: shape {first.segment.shape} and {first.dtype} on rank {first_rank}, shape "
                f"{row.segment.shape} and {row.dtype} on rank {rank}; build the same model on every rank, or give tensors that differ "
                f"different names by passing named parameters"
            )
        known_rank, known = replicas.setdefault(row.segment, (rank, row))
        differ = _how_replicas_differ(known, row, largest_norm)
        if differ:
            raise ValueError(
                f"ranks {known_rank} and {rank} both hold {name!r} (shape {row.segment.shape}), but with different {differ}: they are not "
                f"replicas of one tensor. If they should be, start from equal values (broadcast them from one rank, or seed all ranks "
                f"alike) and average the gradients, as DDP does; if they are different tensors (stages of a pipeline, experts), pass named "
                f"parameters with names that are unique over all ranks; if the ranks train apart, pass process_group= with those that "
                f"train together; if a wrapper flattened the parameters, say how they lie in its tensors with layout="
            )
    problem = find_tiling_error(list(replicas))
    if problem:
        held = "; ".join(
            f"rank {rank}: {row.segment.count} x {row.segment.run} elements from {row.segment.start}, {row.segment.stride} apart"
            for rank, row in pieces[:8]
        )
        raise ValueError(
            f"the pieces of {name!r} (shape {first.segment.shape}) do not tile it: {problem} ({held}); every rank that holds a piece must "
            f"be in the optimizer's process group and hold runs of elements that a Segment can express"
        )


def _how_replicas_differ(a: _Row, b: _Row, largest_norm: float) -> str | None:
    """None for replicas. Gradients of replicas may differ in their last bits, where kernels are not deterministic."""
    if a.fingerprint != b.fingerprint:
        return "values"
    if a.grad_norm is None or b.grad_norm is None:
        return None
    larger = max(a.grad_norm, b.grad_norm)
    if larger > NOISE * largest_norm and abs(a.grad_norm - b.grad_norm) > GRADIENTS_DIFFER * larger:
        return "gradients"
    return None


def _fingerprint(values: Tensor) -> int:
    """A position-sensitive hash of their bits."""
    bits = values.contiguous().flatten().view(torch.int16 if values.element_size() == 2 else torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), HASHED_AT_ONCE):
        chunk = bits[start : start + HASHED_AT_ONCE].to(torch.int64)
        weights = 2 * torch.arange(start, start + chunk.numel(), device=bits.device) + 1  # odd: no single change is lost modulo 2**64
        total += (chunk * weights).sum()
    return int(total)
