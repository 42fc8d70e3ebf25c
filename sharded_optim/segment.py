"""Which elements of which tensor a local buffer holds.

A `Segment` is the one description of a shard that the rest of the library uses. The wrappers (`sharding/`) produce segments; ownership,
the check that pieces tile a tensor, and checkpoints consume them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Segment", "find_tiling_error"]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """`count` runs of `run` elements, `stride` apart, beginning at `start` in the row-major flattening of tensor `name`.

    Equal sets of elements have equal segments: adjacent runs are merged and an empty segment is all zeros.

    >>> Segment(name="w", shape=(5, 3), start=2, run=1, stride=3, count=5)  # Shard(1) of (5, 3) on rank 1 of 2
    Segment(name='w', shape=(5, 3), start=2, run=1, stride=3, count=5)
    """

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int  # element offsets and lengths, in the flattened whole tensor
    run: int
    stride: int
    count: int

    def __post_init__(self) -> None:
        start, run, stride, count = self.start, self.run, self.stride, self.count
        if min(start, run, stride, count, *self.shape, 0) < 0:
            raise ValueError(f"segment of {self.name!r} has a negative extent: {self!r}")
        if run * count == 0:
            start = run = stride = count = 0
        elif count == 1 or stride == run:
            start, run, stride, count = start, run * count, run * count, 1
        elif stride < run:
            raise ValueError(f"segment of {self.name!r} has runs that overlap (stride {stride} < run {run}): {self!r}")
        for field, value in (("start", start), ("run", run), ("stride", stride), ("count", count)):
            object.__setattr__(self, field, value)
        if self.numel and start + (count - 1) * stride + run > self.tensor_numel:
            raise ValueError(f"segment of {self.name!r} reaches beyond its tensor of shape {self.shape}: {self!r}")

    @property
    def numel(self) -> int:
        """Number of elements this segment holds."""
        return self.run * self.count

    @property
    def tensor_numel(self) -> int:
        """Number of elements of the whole tensor."""
        return math.prod(self.shape)

    @classmethod
    def whole(cls, name: str, shape: Sequence[int]) -> Segment:
        """All elements of a tensor."""
        return cls.flat(name, shape, 0, math.prod(shape))

    @classmethod
    def flat(cls, name: str, shape: Sequence[int], start: int, length: int) -> Segment:
        """Elements [start, start + length) of the flattened tensor."""
        return cls(name=name, shape=tuple(shape), start=start, run=length, stride=length, count=1)

    @classmethod
    def box(cls, name: str, shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> Segment:
        """The box of `sizes` at `offsets` of a row-major tensor.

        Raises:
            ValueError: the box is not `count` equal runs at one stride, as when a tensor is cut along two inner dimensions.
        """
        shape, sizes = tuple(shape), tuple(sizes)
        if math.prod(sizes) == 0:
            return cls.flat(name, shape, 0, 0)
        steps = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]  # elements from one index of a dimension to the next
        loops: list[tuple[int, int]] = []  # (length, step), outermost first; neighbours that walk on at one step are one loop
        for size, step in zip(sizes, steps, strict=True):
            if size == 1:
                continue
            if loops and loops[-1][1] == size * step:
                loops[-1] = (loops[-1][0] * size, step)
            else:
                loops.append((size, step))
        run = loops.pop()[0] if loops and loops[-1][1] == 1 else 1
        if len(loops) > 1:
            cut = [dim for dim, size in enumerate(sizes) if size != shape[dim]]
            raise ValueError(
                f"{name!r} of shape {shape} is cut along dimensions {cut} into boxes of {sizes}, which are not equally spaced runs of "
                f"elements; shard it along fewer inner dimensions (for example Shard(0) and one other)"
            )
        count, stride = loops[0] if loops else (1, run)
        start = sum(offset * step for offset, step in zip(offsets, steps, strict=True))
        return cls(name=name, shape=shape, start=start, run=run, stride=stride, count=count)

    def run_starts(self) -> Tensor:
        """Offsets at which the runs begin: int64, shape (count,)."""
        return self.start + self.stride * torch.arange(self.count, dtype=torch.int64)


def find_tiling_error(segments: Sequence[Segment]) -> str | None:
    """Check that distinct segments of one tensor cover each element exactly once.

    Returns:
        None when they do, else what is wrong at which element.
    """
    numel = segments[0].tensor_numel
    filled = [segment for segment in segments if segment.numel]
    if sum(segment.numel for segment in filled) == numel and len(filled) <= 1:
        return None
    starts = torch.cat([segment.run_starts() for segment in filled] or [torch.empty(0, dtype=torch.int64)])
    lengths = torch.cat([torch.full((segment.count,), segment.run) for segment in filled] or [torch.empty(0, dtype=torch.int64)])
    starts, order = starts.sort()
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), starts + lengths[order]])
    starts = torch.cat([starts, torch.tensor([numel])])
    wrong = (starts != ends).nonzero()
    if not len(wrong):
        return None
    begin, end = int(starts[wrong[0]]), int(ends[wrong[0]])
    if begin > end:
        return f"elements [{end}, {begin}) of {numel} are held by no rank"
    return f"element {begin} of {numel} is held by two different pieces"
