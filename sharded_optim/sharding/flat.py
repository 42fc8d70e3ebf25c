"""Flat tensors: a wrapper concatenates parameters to one flat tensor, cuts it into ranges, and gives the optimizer this rank's range.

A flat tensor has no record of the elements that it holds, so a `FlatLayout` describes them: `fsdp1.py` and `deepspeed.py` make it, and the
optimizers take it as `layout=`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from sharded_optim.sharding import plain
from sharded_optim.sharding.layout import LocalParam, Piece
from sharded_optim.sharding.plain import check_dtype_and_layout, ordinary
from sharded_optim.sharding.segment import Segment

__all__ = ["FlatLayout", "FlatTensor", "piece_in_range"]


@dataclass(frozen=True, kw_only=True)
class FlatTensor:
    """The pieces in one flat tensor on this rank."""

    numel: int  # with padding
    pieces: tuple[Piece, ...]
    shapes: Mapping[str, tuple[int, ...]]  # of all tensors in it, by name, on whatever ranks their elements are

    @classmethod
    def holding(cls, numel: int, pieces: Iterable[Piece]) -> FlatTensor:
        """Make a flat tensor of the pieces that are not empty, or of one if all are: the rank then counts steps like the others.

        Args:
            numel: with padding.
            pieces: one of each tensor in it, also of those of which this rank holds nothing.
        """
        pieces = tuple(pieces)
        shapes = {piece.segment.name: piece.segment.shape for piece in pieces}
        return cls(numel=numel, pieces=tuple(piece for piece in pieces if piece.segment.numel) or pieces[:1], shapes=shapes)


@dataclass(frozen=True, kw_only=True, eq=False)
class FlatLayout:
    """The flat and the ordinary tensors that a wrapper gives the optimizer on this rank.

    Attributes:
        flat: each tensor that the wrapper gives the optimizer for several parameters, or for a part of one.
        whole: the names of the parameters that it leaves as they are.
        unknown_param_error: why a tensor that is neither cannot be stepped, and the way out.
        steps_by_group: whether the wrapper splits a step into several calls of the optimizer, each with some of its tensors in the groups.
        units: numbers of units: tensors whose gradients are complete together. Each unit is stepped by calls of its own, in the order of
            the numbers. Tensors without a number are in unit 0.
    """

    flat: Mapping[Tensor, FlatTensor]
    whole: Mapping[Tensor, str]
    unknown_param_error: str
    steps_by_group: bool = False
    units: Mapping[Tensor, int] = field(default_factory=dict)

    def describe(self, param: Tensor, name: str) -> LocalParam:
        """As `sharding.describe`."""
        if param in self.whole:
            return plain.describe(param, self.whole[param])
        if param not in self.flat:
            raise ValueError(f"parameter {name!r} of shape {tuple(param.shape)} {self.unknown_param_error}")
        return _describe(param, name, self.flat[param])


def _describe(param: Tensor, name: str, held: FlatTensor) -> LocalParam:
    check_dtype_and_layout(param, f"parameter {name!r}")

    def local(tensor: Tensor, role: str) -> Tensor:
        tensor = ordinary(tensor, role, name)
        if tensor.numel() != held.numel or not tensor.is_contiguous():
            raise ValueError(
                f"{role} of {name!r} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, but this rank's shard of it has "
                f"{held.numel} elements one after the other; step when the wrapper has sharded them, after backward and outside of what "
                f"gathers whole parameters"
            )
        return tensor

    return LocalParam(param=param, name=name, pieces=held.pieces, local=local)


def piece_in_range(name: str, shape: Sequence[int], offset: int, start: int, length: int) -> Piece:
    """Return the piece of a tensor that lies in a rank's range [start, start + length) of a flat tensor; it may be empty."""
    numel = Segment.whole(name, shape).numel
    first, end = max(start, offset), min(start + length, offset + numel)
    if first >= end:
        return Piece(segment=Segment.flat(name, shape, 0, 0), offset=0)
    return Piece(segment=Segment.flat(name, shape, first - offset, end - first), offset=first - start)
