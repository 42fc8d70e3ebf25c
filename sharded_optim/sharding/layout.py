"""What every rank holds, and who owns it.

A `Layout` is built once per set of parameters. With a process group it is a collective: all ranks exchange their segments, refuse together
what does not fit together, and choose for each distinct piece of a tensor the one rank that owns it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim.ranks import join_messages
from sharded_optim.segment import Segment, find_tiling_error

__all__ = ["Layout", "LocalParam"]


@dataclass(frozen=True, kw_only=True)
class LocalParam:
    """This rank's piece of one parameter."""

    param: Tensor  # as the param group holds it; the key of its optimizer state
    segment: Segment
    # (param, gradient or state tensor, its role for error messages) -> this rank's part, any shape, sharing memory.
    # Raises ValueError when the tensor is not laid out like the parameter.
    local: Callable[[Tensor, str], Tensor]
    # Whether only the name says that ranks hold the same tensor. A DTensor says so itself.
    told_by_name: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All local parameters of an optimizer and the model-wide list of tensors."""

    local_params: tuple[LocalParam, ...]
    names: tuple[str, ...]  # every tensor of the whole model, on all ranks in the same order
    numels: tuple[int, ...]  # of these tensors
    slots: tuple[int, ...]  # index into `names` of each local parameter
    owned: tuple[bool, ...]  # whether this rank is the one that speaks for the piece; replicas have exactly one owner
    shapes: tuple[torch.Size, ...] = field(repr=False)  # of the local parameters when they were described

    @classmethod
    def of_rank(cls, local_params: Sequence[LocalParam]) -> Layout:
        """What this rank holds, for algorithms that need nothing from other ranks. No communication."""
        return cls(
            local_params=tuple(local_params),
            names=tuple(entry.segment.name for entry in local_params),
            numels=tuple(entry.segment.tensor_numel for entry in local_params),
            slots=tuple(range(len(local_params))),
            owned=(True,) * len(local_params),
            shapes=tuple(entry.param.shape for entry in local_params),
        )

    @classmethod
    def of_group(
        cls, describe: Callable[[], Sequence[LocalParam]], process_group: dist.ProcessGroup | None, *, positional_names: bool
    ) -> Layout:
        """Put together what all ranks of `process_group` hold (None: this process is all there is). A collective.

        Args:
            describe: describes this rank's parameters; a ValueError it raises on one rank is raised on all.
            positional_names: names were made up from positions, so that equal names on two ranks do not show that the tensors are the same.

        Raises:
            ValueError: on every rank alike, when ranks disagree about a tensor or their pieces do not tile it.
        """
        compare = positional_names and process_group is not None
        local_params: Sequence[LocalParam] = ()
        rows: list[_Row] | str
        try:
            local_params = describe()
            rows = [
                _Row(
                    segment=entry.segment,
                    dtype=str(entry.param.dtype),
                    fingerprint=_fingerprint(entry) if compare and entry.told_by_name else None,
                )
                for entry in local_params
            ]
        except ValueError as error:
            rows = str(error)
        rank, tables = 0, [rows]
        if process_group is not None:
            rank = dist.get_rank(process_group)
            tables: list[Any] = [None] * dist.get_world_size(process_group)
            dist.all_gather_object(tables, rows, group=process_group)
        failures = [table if isinstance(table, str) else None for table in tables]
        if any(failures):
            raise ValueError(join_messages(failures) if process_group else failures[0])

        holders: dict[str, list[tuple[int, _Row]]] = defaultdict(list)
        for holder, table in enumerate(tables):
            for row in table:
                holders[row.segment.name].append((holder, row))
        owner: dict[Segment, int] = {}
        for name, pieces in holders.items():
            _check_agreement(name, pieces)
            for holder, row in pieces:
                owner.setdefault(row.segment, holder)
        names = tuple(holders)
        index = {name: slot for slot, name in enumerate(names)}
        return cls(
            local_params=tuple(local_params),
            names=names,
            numels=tuple(pieces[0][1].segment.tensor_numel for pieces in holders.values()),
            slots=tuple(index[entry.segment.name] for entry in local_params),
            owned=tuple(owner[entry.segment] == rank for entry in local_params),
            shapes=tuple(entry.param.shape for entry in local_params),
        )

    def describes(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the parameters this layout was built from; wrappers replace them."""
        if len(params) != len(self.local_params):
            return False
        pairs = zip(params, self.local_params, self.shapes, strict=True)
        return all(param is entry.param and param.shape == shape for param, entry, shape in pairs)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """What a rank tells the others about one of its pieces."""

    segment: Segment
    dtype: str
    fingerprint: int | None


def _check_agreement(name: str, pieces: list[tuple[int, _Row]]) -> None:
    first_rank, first = pieces[0]
    replicas: dict[Segment, tuple[int, _Row]] = {}
    for rank, row in pieces:
        if row.segment.shape != first.segment.shape or row.dtype != first.dtype:
            raise ValueError(
                f"ranks disagree about {name!r}: shape {first.segment.shape} and {first.dtype} on rank {first_rank}, shape "
                f"{row.segment.shape} and {row.dtype} on rank {rank}; build the same model on every rank, or give tensors that differ "
                f"different names by passing model.named_parameters()"
            )
        known_rank, known = replicas.setdefault(row.segment, (rank, row))
        if row.fingerprint != known.fingerprint:
            raise ValueError(
                f"ranks {known_rank} and {rank} both hold {name!r} (shape {row.segment.shape}), with different values: they are not "
                f"replicas of one tensor; pass model.named_parameters() with names that are unique over all ranks, or process_group= "
                f"with only the ranks that train this model together"
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


def _fingerprint(entry: LocalParam) -> int:
    """A position-sensitive hash of the piece's bits."""
    local = entry.local(entry.param, "parameter").detach()
    bits = local.contiguous().flatten().view(torch.int16 if local.element_size() == 2 else torch.int32).to(torch.int64)
    weights = 2 * torch.arange(bits.numel(), device=bits.device) + 1  # odd, so that no single change is lost modulo 2**64
    return int((bits * weights).sum())
