"""Build the layout of all ranks, by one exchange.

All ranks refuse together what does not fit together, and choose for each distinct piece of a tensor the one rank that owns it.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim.sharding.layout import GRADIENT, PARAMETER, Layout, LocalParam, segments_of
from sharded_optim.sharding.matrices import Holding, Matrices, plan_matrices
from sharded_optim.sharding.ranks import join_messages, naming_missing_ranks
from sharded_optim.sharding.segment import Segment, find_tiling_error
from sharded_optim.sharding.wrappers import partial_of

__all__ = ["exchange_layouts"]

GRADIENTS_DIFFER = 1e-2  # relative difference of norms at which gradients are not the same up to rounding
HASHED_AT_ONCE = 2**20  # elements, each of which takes 24 bytes for a moment
NOISE = 1e-4  # of the largest gradient norm: a gradient below may be rounding noise alone


def exchange_layouts(
    describe: Callable[[], Sequence[LocalParam]],
    process_group: dist.ProcessGroup | None,
    *,
    compares_values: Callable[[Tensor], bool],
) -> Layout:
    """Build the layout of all ranks of `process_group`; None means this process alone. A collective.

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
    except Exception as error:  # the other ranks must get the error before this one raises
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
    of_matrices: dict[str, list[Holding]] = defaultdict(list)
    matrices_of: dict[str, Matrices] = {}
    for holder, table in enumerate(tables):
        for index, row in enumerate(table):
            holders[row.segment.name].append((holder, row))
            if row.matrices is not None:
                matrices_of[row.segment.name] = row.matrices
                of_matrices[row.segment.name].append(Holding(holder, index, row.segment))
    owner: dict[Segment, int] = {}
    for name, pieces in holders.items():
        _check_agreement(name, pieces, largest_norm)
        for holder, row in pieces:
            owner.setdefault(row.segment, holder)
    with_elements = {name: [row for _, row in pieces if row.segment.numel] for name, pieces in holders.items()}
    partial_of = {row.segment.name: row.partial for table in tables for row in table if row.partial is not None}
    names = tuple(holders)
    index = {name: slot for slot, name in enumerate(names)}
    return Layout(
        local_params=tuple(local_params),
        names=names,
        numels=tuple(pieces[0][1].segment.tensor_numel for pieces in holders.values()),
        slots=tuple(index[segment.name] for segment in segments_of(local_params)),
        owned=tuple(owner[segment] == rank for segment in segments_of(local_params)),
        balance=tuple(_balance(row, with_elements[row.segment.name]) for row in tables[rank]),
        is_global=True,
        matrices=plan_matrices(matrices_of, of_matrices, rank, len(tables)),
        partial={
            row: partial_of[piece.segment.name]
            for row, entry in enumerate(local_params)
            for piece in entry.pieces
            if piece.segment.name in partial_of
        },
        process_group_ref=None if process_group is None else weakref.ref(process_group),
    )


@dataclass(frozen=True, kw_only=True)
class _Row:
    """The description of one piece that a rank sends to the others."""

    segment: Segment
    dtype: str
    fingerprint: int | None = None  # of the values
    grad_norm: float | None = None  # None without a gradient, or a finite one
    partial: Any = None  # how the gradient is yet to be reduced
    matrices: Matrices | None = None  # that the tensor is

    @classmethod
    def of(cls, entry: LocalParam, *, alone: bool, compare_values: bool) -> Iterator[_Row]:
        """Make a row for each piece."""
        dtype = str(entry.param.dtype)
        param = entry.local(entry.param, PARAMETER).detach()
        grad = None if alone else entry.param.grad
        partial = partial_of(grad)
        grad = None if grad is None or partial is not None else entry.local(grad, GRADIENT)
        for piece in entry.pieces:
            fingerprint = grad_norm = None
            if piece.segment.numel and not alone:
                norm = math.nan if grad is None else float(torch.linalg.vector_norm(piece.of(grad), dtype=torch.float32))
                grad_norm = norm if math.isfinite(norm) else None
                fingerprint = _fingerprint(piece.of(param)) if compare_values else None
            compared = {"fingerprint": fingerprint, "grad_norm": grad_norm}
            yield cls(segment=piece.segment, dtype=dtype, partial=partial, matrices=piece.matrices, **compared)


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
        if row.matrices != first.matrices:
            raise ValueError(
                f"ranks {first_rank} and {rank} disagree about the matrices that {name!r} (shape {first.segment.shape}) is, or whether it "
                f"is stepped as matrices at all; give it the same param group on every rank"
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


def _balance(row: _Row, pieces: list[_Row]) -> int:
    """Return the balance of a piece among those of its tensor that have an element; see `Layout`."""
    if not row.segment.numel:
        return 0
    return len(pieces) - 1 if row is pieces[0] else -1


def _how_replicas_differ(a: _Row, b: _Row, largest_norm: float) -> str | None:
    """Say how two pieces differ; None for replicas.

    Gradients of replicas may differ in their last bits, where kernels are not deterministic.
    """
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
