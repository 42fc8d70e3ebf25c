"""Build the layout of all ranks by one exchange of the pieces that each rank holds.

The exchange chooses one owner for each distinct piece of a tensor. Errors are raised on all ranks together.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim.sharding.layout import GRADIENT, PARAMETER, Layout, LocalParam
from sharded_optim.sharding.matrices import Holding, Matrices, MatrixPlan, plan_matrices
from sharded_optim.sharding.piece_exchange import HeldPiece, PieceExchange, RowText, attempt
from sharded_optim.sharding.ranks import gather_messages, gather_objects, naming_missing_ranks
from sharded_optim.sharding.row_exchange import Array, hash_words
from sharded_optim.sharding.segment import Segment
from sharded_optim.sharding.wrappers import partial_of

__all__ = ["exchange_layouts"]

GRADIENTS_DIFFER = 1e-2  # relative difference of norms above which gradients differ by more than rounding
HASHED_AT_ONCE = 2**20  # elements; each needs 24 bytes of temporary memory
NOISE = 1e-4  # times the largest gradient norm: gradients of smaller norm may be rounding noise, and are not compared
SHOWN = 8  # pieces listed in an error message

# Columns of `facts`, the numbers that each rank sends to all.
FAILED, LARGEST_NORM, HAS_OBJECTS = range(3)
# Columns of `further`, the numbers of a piece beside its extents.
FINGERPRINT, IS_COMPARED, IS_PARTIAL, GRAD_NORM, MATRICES = range(5)
FURTHER = 5
# Bits of the reply to the holder of a piece.
OWNED, FIRST, NEEDS_TEXT, SENDS_PARTIAL = 1, 2, 4, 8
# Kinds of differences between pieces of one tensor.
SHAPE, WHICH_MATRICES, VALUES, GRADIENTS = 1, 2, 3, 4


def exchange_layouts(
    describe: Callable[[], Sequence[LocalParam]],
    process_group: dist.ProcessGroup | None,
    *,
    compares_values: Callable[[Tensor], bool],
) -> Layout:
    """Build the layout of all ranks of `process_group`; None means this process alone. A collective.

    Args:
        describe: describes this rank's parameters; an error on one rank is raised on all.
        compares_values: whether a parameter's replicas must have the same values, bit for bit; norms of gradients are compared roughly in
            any case, except of Partial, missing, non-finite or very small ones.

    Raises:
        ValueError: on all ranks, if ranks disagree about a tensor, their pieces do not tile it, or pieces that should be replicas differ.
    """
    own, failure = attempt(lambda: _LocalPieces.of(describe(), alone=process_group is None, compares_values=compares_values))
    what = "what each rank holds, which is exchanged before the first step of these parameters"
    with nullcontext() if process_group is None else naming_missing_ranks(process_group, what):
        return _exchange(own or _LocalPieces(), failure, process_group)


def _exchange(own: _LocalPieces, failure: str | None, process_group: dist.ProcessGroup | None) -> Layout:
    """Exchange the pieces that ranks hold.

    Each tensor is checked by one rank, which receives the tensor's pieces from all ranks and replies to each holder whether it owns its
    piece. Names of tensors, and errors, then go to all ranks.
    """
    norms = own.further[:, GRAD_NORM].view(np.float64)
    has_objects = any(value is not None for value in (*own.partial, *own.matrices))
    facts = [failure is not None, np.fmax.reduce(norms, initial=0.0).view(np.int64), has_objects]
    exchange = PieceExchange(own.pieces, own.further, list(map(int, facts)), process_group)
    if exchange.facts[:, FAILED].any():
        raise ValueError(gather_messages(failure, process_group))
    largest_norm = float(exchange.facts[:, LARGEST_NORM].copy().view(np.float64).max())
    checks, problem = attempt(lambda: PieceChecks(exchange, largest_norm))
    sent = np.zeros((len(exchange.tensor), 2), dtype=np.int64) if checks is None else checks.replies
    replies, balance = exchange.reply(sent).T
    texts = exchange.texts(sent[:, 0] & NEEDS_TEXT != 0, replies & NEEDS_TEXT != 0)
    checked, problem = attempt(lambda: (checks.failure(texts), checks.tensors(texts))) if checks is not None else (None, problem)
    of_ranks = gather_objects(((-1, -1, problem), []) if checked is None else checked, process_group)
    failures = [failed for failed, _ in of_ranks if failed is not None]
    if failures:
        raise ValueError(min(failures)[-1])
    tensors = sorted(tensor for _, checked in of_ranks for tensor in checked)
    names = tuple(name for *_, name in tensors)
    slots = {name: slot for slot, name in enumerate(names)}
    objects = gather_objects(own.objects(replies, slots), process_group) if exchange.facts[:, HAS_OBJECTS].any() else []
    partial = {name: value for of_rank in objects for name, value in of_rank.partial.items()}
    return Layout(
        local_params=own.local_params,
        names=names,
        numels=tuple(numel for _, _, numel, _ in tensors),
        slots=tuple(slots[piece.key] for piece in own.pieces),
        owned=tuple((replies & OWNED != 0).tolist()),
        balance=tuple(balance.tolist()),
        is_global=True,
        matrices=_matrix_plans(objects, names, process_group),
        partial={
            row: partial[piece.segment.name]
            for row, entry in enumerate(own.local_params)
            for piece in entry.pieces
            if piece.segment.name in partial
        },
        process_group_ref=None if process_group is None else weakref.ref(process_group),
    )


class _Objects(NamedTuple):
    """What a rank sends to all others as Python objects."""

    matrix_pieces: list[tuple[int, int, Segment]]  # of pieces of matrices: slot of the tensor, index of the piece on the rank, segment
    matrices: dict[int, Matrices]  # by slot, of the tensors whose first holder the rank is
    partial: dict[str, Any]  # by tensor: how Partial gradients still have to be reduced


def _matrix_plans(objects: Sequence[_Objects], names: Sequence[str], process_group: dist.ProcessGroup | None) -> tuple[MatrixPlan, ...]:
    """Plan the exchange of whole matrices, from the holders of all matrices on all ranks."""
    matrices = {slot: value for of_rank in objects for slot, value in of_rank.matrices.items()}
    holders: dict[str, list[Holding]] = {names[slot]: [] for slot in sorted(matrices)}
    for rank, of_rank in enumerate(objects):
        for slot, number, segment in of_rank.matrix_pieces:
            holders[names[slot]].append(Holding(rank, number, segment))
    rank = 0 if process_group is None else dist.get_rank(process_group)
    return plan_matrices({names[slot]: matrices[slot] for slot in sorted(matrices)}, holders, rank, len(objects))


@dataclass(kw_only=True)
class _LocalPieces:
    """The local parameters of this rank, and their pieces."""

    local_params: tuple[LocalParam, ...] = ()
    pieces: list[HeldPiece] = field(default_factory=list)  # of all local parameters, in order
    further: Array = field(default_factory=lambda: np.zeros((0, FURTHER), dtype=np.int64))  # (pieces, FURTHER)
    partial: list[Any] = field(default_factory=list)  # of each piece: how its gradient still must be reduced
    matrices: list[Matrices | None] = field(default_factory=list)  # of each piece: its tensor's matrices, if any

    @classmethod
    def of(cls, local_params: Sequence[LocalParam], *, alone: bool, compares_values: Callable[[Tensor], bool]) -> _LocalPieces:
        """Compute the numbers and objects that this rank sends about its local parameters."""
        own = cls(local_params=tuple(local_params))
        further: list[tuple[int, bool, int]] = []
        norms: list[float] = []
        for entry in local_params:
            param = entry.local(entry.param, PARAMETER).detach()
            grad = None if alone else entry.param.grad
            partial = partial_of(grad)
            grad = None if grad is None or partial is not None else entry.local(grad, GRADIENT)
            compares = not alone and compares_values(entry.param)
            for piece in entry.pieces:
                is_compared = compares and piece.segment.numel > 0
                fingerprint = _fingerprint(piece.of(param)) if is_compared else 0
                values = grad if piece.segment.numel else None
                norms.append(float(torch.linalg.vector_norm(piece.of(values), dtype=torch.float32)) if values is not None else math.nan)
                further.append((fingerprint, is_compared, partial is not None))
                own.pieces.append(HeldPiece(piece.segment.name, piece.segment, str(entry.param.dtype)))
                own.partial.append(partial)
                own.matrices.append(piece.matrices)
        own.further = np.empty((len(own.pieces), FURTHER), dtype=np.int64)
        own.further[:, :GRAD_NORM] = np.array(further, dtype=np.int64).reshape(len(further), GRAD_NORM)
        own.further[:, GRAD_NORM] = np.array([norm if math.isfinite(norm) else math.nan for norm in norms]).view(np.int64)
        of_matrices = {matrices: int(hash_words([repr(matrices).encode()])[0, 0]) for matrices in set(own.matrices) - {None}}
        own.further[:, MATRICES] = [of_matrices.get(matrices, 0) for matrices in own.matrices]
        return own

    def objects(
        self,
        replies: Array,  # int64 (pieces,)
        slots: Mapping[str, int],  # by name of the tensor
    ) -> _Objects:
        objects = _Objects([], {}, {})
        for number, (reply, piece) in enumerate(zip(replies.tolist(), self.pieces, strict=True)):
            matrices = self.matrices[number]
            if matrices is not None:
                objects.matrix_pieces.append((slots[piece.key], number, piece.segment))
                if reply & FIRST:
                    objects.matrices[slots[piece.key]] = matrices
            if reply & SENDS_PARTIAL:
                objects.partial[piece.key] = self.partial[number]
        return objects


class PieceChecks:
    """Check that the pieces of each tensor that this rank is responsible for tile it, and that replicas are equal.

    Attributes:
        replies: int64 (rows, 2): for the holder of each piece, flags such as OWNED, and the piece's `Layout.balance`.
    """

    def __init__(self, exchange: PieceExchange, largest_norm: float) -> None:
        self._exchange = exchange

        def differs(column: int, others: Array) -> Array:  # bool (rows,): whether a row differs from its row in `others`
            return exchange.further[:, column] != exchange.further[others, column]

        self._known = exchange.first_of_segment[exchange.segment]  # for each row, the first row with the same segment
        self._differences = np.select(
            [
                exchange.contradicts,
                differs(MATRICES, exchange.first_of_tensor[exchange.tensor]),
                differs(FINGERPRINT, self._known) | differs(IS_COMPARED, self._known),
                _gradients_differ(np.ascontiguousarray(exchange.further[:, GRAD_NORM]).view(np.float64), self._known, largest_norm),
            ],
            [SHAPE, WHICH_MATRICES, VALUES, GRADIENTS],
            0,
        )
        self._errors = exchange.tiling_errors()
        differing: dict[int, int] = {}  # the first differing row of each tensor
        for row in np.flatnonzero(self._differences).tolist():
            differing.setdefault(int(exchange.tensor[row]), row)
        failing = min([*differing, *self._errors], default=None)
        self._failing = None if failing is None else (failing, differing.get(failing))  # the first wrong tensor, its row
        replies = np.zeros(len(exchange.tensor), dtype=np.int64)
        replies[exchange.ranks == exchange.ranks[self._known]] |= OWNED
        replies[exchange.first_of_tensor] |= FIRST | NEEDS_TEXT
        if self._failing is not None and self._failing[1] is not None:
            replies[self._failing[1]] |= NEEDS_TEXT
        has_partial = np.flatnonzero(exchange.further[:, IS_PARTIAL])
        last_partial = dict(zip(exchange.tensor[has_partial].tolist(), has_partial.tolist(), strict=True))  # by tensor
        replies[list(last_partial.values())] |= SENDS_PARTIAL
        self.replies = np.column_stack([replies, self._balance()])

    def _balance(self) -> Array:
        held = np.flatnonzero(self._exchange.extents[:, 1])  # empty segments are all zeros
        tensor, tensors = self._exchange.tensor[held], len(self._exchange.first_of_tensor)
        first = np.full(tensors, len(self._exchange.tensor))
        np.minimum.at(first, tensor, held)
        balance = np.zeros(len(self._exchange.tensor), dtype=np.int64)
        balance[held] = np.where(first[tensor] == held, np.bincount(tensor, minlength=tensors)[tensor] - 1, -1)
        return balance

    def tensors(self, texts: Mapping[int, RowText]) -> list[tuple[int, int, int, str]]:
        """List the tensors: rank of the first piece, its index among that rank's pieces, number of elements of the tensor, name."""
        exchange, first = self._exchange, self._exchange.first_of_tensor
        ranks, numbers = exchange.ranks[first].tolist(), exchange.index[first].tolist()
        keys = [texts[row].key for row in first.tolist()]
        return list(zip(ranks, numbers, exchange.numels.tolist(), keys, strict=True))

    def failure(self, texts: Mapping[int, RowText]) -> tuple[int, int, str] | None:
        """Return rank and index of the first piece of the first wrong tensor, and its error; None if there is no error."""
        if self._failing is None:
            return None
        tensor, row = self._failing
        first = int(self._exchange.first_of_tensor[tensor])
        message = self._tiling_message(tensor, texts[first]) if row is None else self._difference_message(first, row, texts)
        return int(self._exchange.ranks[first]), int(self._exchange.index[first]), message

    def _difference_message(self, first: int, row: int, texts: Mapping[int, RowText]) -> str:
        ranks, (name, shape, dtype), here = self._exchange.ranks, texts[first], texts[row]
        kind = int(self._differences[row])
        if kind == SHAPE:
            return (
                f"ranks disagree about {name!r}: shape {shape} and {dtype} on rank {ranks[first]}, shape "
                f"{here.shape} and {here.dtype} on rank {ranks[row]}; build the same model on every rank, or give tensors that differ "
                f"different names by passing named parameters"
            )
        if kind == WHICH_MATRICES:
            return (
                f"ranks {ranks[first]} and {ranks[row]} disagree about the matrices that {name!r} (shape {shape}) is, or whether it "
                f"is stepped as matrices at all; give it the same param group on every rank"
            )
        differ = "values" if kind == VALUES else "gradients"
        return (
            f"ranks {ranks[self._known[row]]} and {ranks[row]} both hold {name!r} (shape {shape}), but with different {differ}: they are "
            f"not replicas of one tensor. If they should be, start from equal values (broadcast them from one rank, or seed all ranks "
            f"alike) and average the gradients, as DDP does; if they are different tensors (stages of a pipeline, experts), pass named "
            f"parameters with names that are unique over all ranks; if the ranks train apart, pass process_group= with those that "
            f"train together; if a wrapper flattened the parameters, say how they lie in its tensors with layout="
        )

    def _tiling_message(self, tensor: int, text: RowText) -> str:
        rows = np.flatnonzero(self._exchange.tensor == tensor)[:SHOWN]
        held = "; ".join(
            f"rank {self._exchange.ranks[row]}: {count} x {run} elements from {start}, {stride} apart"
            for row, (start, run, stride, count) in zip(rows.tolist(), self._exchange.extents[rows].tolist(), strict=True)
        )
        return (
            f"the pieces of {text.key!r} (shape {text.shape}) do not tile it: {self._errors[tensor]} ({held}); every rank that holds a "
            f"piece must be in the optimizer's process group and hold runs of elements that a Segment can express"
        )


def _gradients_differ(
    norms: Array,  # float64 (rows,); NaN if there is no gradient, or the norm is not finite
    others: Array,  # int64 (rows,), index of the row with which each row is compared
    largest_norm: float,
) -> Array:  # bool (rows,)
    """Compare gradient norms of replicas, with a tolerance: kernels that are not deterministic give other last bits."""
    larger = np.maximum(norms, norms[others])
    return (larger > NOISE * largest_norm) & (np.abs(norms - norms[others]) > GRADIENTS_DIFFER * larger)


def _fingerprint(values: Tensor) -> int:
    """Hash the bits of values and their positions to a 64-bit integer."""
    bits = values.contiguous().flatten().view(torch.int16 if values.element_size() == 2 else torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), HASHED_AT_ONCE):
        chunk = bits[start : start + HASHED_AT_ONCE].to(torch.int64)
        # Odd, so that no change of a single value is lost modulo 2**64.
        weights = 2 * torch.arange(start, start + chunk.numel(), device=bits.device) + 1
        total += (chunk * weights).sum()
    return int(total)
