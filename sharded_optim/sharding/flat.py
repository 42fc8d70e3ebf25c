"""Flat tensors: a wrapper concatenates parameters to one flat tensor and cuts it into ranges; the optimizer steps this rank's range.

A flat tensor does not record which elements it holds, so a `FlatLayout` describes them: made by `fsdp1.py`, `deepspeed.py` and `zero/`, and
passed to optimizers as `layout=`.
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
    shapes: Mapping[str, tuple[int, ...]]  # by name, of all tensors in it, also tensors without elements on this rank

    @classmethod
    def holding(cls, numel: int, pieces: Iterable[Piece]) -> FlatTensor:
        """Build a FlatTensor of the non-empty pieces. If all are empty, the first is kept, so that this rank counts steps like the others.

        Args:
            numel: number of elements, with padding.
            pieces: one piece of each tensor; empty where this rank holds no elements.
        """
        pieces = tuple(pieces)
        shapes = {piece.segment.name: piece.segment.shape for piece in pieces}
        return cls(numel=numel, pieces=tuple(piece for piece in pieces if piece.segment.numel) or pieces[:1], shapes=shapes)


@dataclass(frozen=True, kw_only=True, eq=False)
class FlatLayout:
    """What the tensors that a wrapper gives the optimizer hold on this rank: flat tensors, and whole parameters.

    Attributes:
        flat: the content of each flat tensor, which stands for several parameters or a part of one.
        whole: the name of each parameter that the wrapper has not flattened.
        unknown_param_error: the error for a tensor in neither: why it cannot be stepped, and the way out.
        steps_by_group: whether the wrapper splits a step into several calls of the optimizer, each with some of its tensors in the groups.
        units: the number of each tensor's unit. The gradients of a unit are complete together. Units are stepped by separate kernel calls,
            in the order of their numbers. Tensors without a number are in unit 0.
    """

    flat: Mapping[Tensor, FlatTensor]
    whole: Mapping[Tensor, str]
    unknown_param_error: str
    steps_by_group: bool = False
    units: Mapping[Tensor, int] = field(default_factory=dict)

    def describe(self, param: Tensor, name: str) -> LocalParam:
        """Describe a parameter of this layout; see `sharding.describe`."""
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
