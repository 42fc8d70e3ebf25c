"""Segments: which elements of which tensor a local buffer holds.

A `Segment` is the one description of a shard that the rest of the library uses. The wrappers' files in `sharding/` produce segments. They
are used to choose owners, to check that pieces tile a tensor, and by checkpoints, which cut segments and compute overlaps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Overlap", "Segment", "find_tiling_error", "find_tiling_error_of", "overlaps"]

EXPANDED_AT_ONCE = 2**20  # runs; limits memory where segments have many short runs


@dataclass(frozen=True, kw_only=True)
class Segment:
    """`count` runs of `run` elements, `stride` apart, beginning at `start` in the row-major flattening of tensor `name`.

    Equal sets of elements have equal segments: adjacent runs are merged, and an empty segment has start, run, stride and count 0.

    >>> Segment(name="w", shape=(5, 3), start=2, run=1, stride=3, count=5)  # Shard(1) of (5, 3) on rank 1 of 2
    Segment(name='w', shape=(5, 3), start=2, run=1, stride=3, count=5)
    """

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int  # this and the next two in elements of the flattened whole tensor
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
        if (start, run, stride, count) != (self.start, self.run, self.stride, self.count):
            for field, value in (("start", start), ("run", run), ("stride", stride), ("count", count)):
                object.__setattr__(self, field, value)
        if self.numel and start + (count - 1) * stride + run > self.tensor_numel:
            raise ValueError(f"segment of {self.name!r} reaches beyond its tensor of shape {self.shape}: {self!r}")

    @property
    def numel(self) -> int:
        """Number of elements of this segment."""
        return self.run * self.count

    @property
    def tensor_numel(self) -> int:
        """Number of elements of the whole tensor."""
        return math.prod(self.shape)

    @classmethod
    def whole(cls, name: str, shape: Sequence[int]) -> Segment:
        """Build the segment of all elements of a tensor."""
        return cls.flat(name, shape, 0, math.prod(shape))

    @classmethod
    def flat(cls, name: str, shape: Sequence[int], start: int, length: int) -> Segment:
        """Build the segment of the elements [start, start + length) of the flattened tensor."""
        return cls(name=name, shape=tuple(shape), start=start, run=length, stride=length, count=1)

    @classmethod
    def box(cls, name: str, shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> Segment:
        """Build the segment of the box of `sizes` at `offsets` in a row-major tensor.

        Raises:
            ValueError: the box is not `count` equal runs at one stride, as when a tensor is cut along two inner dimensions.
        """
        shape, sizes = tuple(shape), tuple(sizes)
        if math.prod(sizes) == 0:
            return cls.flat(name, shape, 0, 0)
        steps = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]  # elements from one index of a dimension to the next
        loops: list[tuple[int, int]] = []  # (length, step), outermost first; adjacent loops that can be one are merged
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
        return self.start + self.stride * torch.arange(self.count, dtype=torch.int64, device="cpu")

    def elements_before(self, element: int) -> int:
        """Count the elements of this segment that come before an element of the tensor: the element's position in a buffer of the segment.

        >>> Segment(name="w", shape=(5, 3), start=2, run=1, stride=3, count=5).elements_before(6)
        2
        """
        beyond = element - self.start
        if beyond <= 0 or not self.numel:
            return 0
        runs = min(beyond // self.stride, self.count)
        return runs * self.run + (min(beyond - runs * self.stride, self.run) if runs < self.count else 0)

    def cut(self, numel: int) -> Iterator[Segment]:
        """Cut this segment into segments of at most `numel` elements, in order.

        >>> whole = Segment.whole("w", (5, 3))
        >>> [(part.start, part.numel) for part in whole.cut(6)]
        [(0, 6), (6, 6), (12, 3)]
        """
        rows = max(1, numel // self.run) if self.run else 1
        for first in range(0, self.count, rows):
            count = min(rows, self.count - first)
            start = self.start + first * self.stride
            if self.run <= numel:
                yield Segment(name=self.name, shape=self.shape, start=start, run=self.run, stride=self.stride, count=count)
            else:
                for offset in range(0, self.run, numel):
                    yield Segment.flat(self.name, self.shape, start + offset, min(numel, self.run - offset))


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Elements that two segments have in common: `count` runs of `run` elements, and their positions in a buffer of each segment."""

    run: int
    count: int
    source: int  # position of the first run in the source's buffer, and the distance from run to run there
    source_stride: int
    target: int
    target_stride: int

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy the common elements from the source's buffer to the target's, both 1-D and contiguous. Casts to the target's dtype."""
        if self.count == 1:
            target[self.target : self.target + self.run].copy_(source[self.source : self.source + self.run])
            return
        shape = (self.count, self.run)
        rows = source.as_strided(shape, (self.source_stride, 1), source.storage_offset() + self.source)
        target.as_strided(shape, (self.target_stride, 1), target.storage_offset() + self.target).copy_(rows)

    def reversed(self) -> Overlap:
        """Return the overlap with source and target exchanged."""
        ends = {"source": self.target, "source_stride": self.target_stride, "target": self.source, "target_stride": self.source_stride}
        return replace(self, **ends)


def overlaps(source: Segment, target: Segment) -> list[Overlap]:
    """Return the overlaps of two segments of one tensor; each common element is in exactly one of them.

    >>> row = Segment.flat("w", (5, 3), 3, 3)
    >>> column = Segment(name="w", shape=(5, 3), start=2, run=1, stride=3, count=5)
    >>> [(overlap.source, overlap.target, overlap.run, overlap.count) for overlap in overlaps(row, column)]
    [(2, 1, 1, 1)]
    """
    if not (source.numel and target.numel):
        return []
    if source.count == 1:
        return list(_with_range(source.start, source.start + source.run, target))
    if target.count == 1:
        return [overlap.reversed() for overlap in _with_range(target.start, target.start + target.run, source)]
    if source.stride == target.stride:
        return list(_with_same_stride(source, target))
    if source.count > target.count:
        return [overlap.reversed() for overlap in overlaps(target, source)]
    found = []
    for row, start in enumerate(source.run_starts().tolist()):
        in_row = _with_range(start, start + source.run, target)
        found += [replace(overlap, source=overlap.source + row * source.run) for overlap in in_row]
    return found


def _with_range(begin: int, end: int, rows: Segment) -> Iterator[Overlap]:
    """Yield the overlaps of a range [begin, end), the source, with the rows of a segment, of which the first and the last may be cut."""
    start, run, stride = rows.start, rows.run, rows.stride
    first = max(0, (begin - start - run) // stride + 1)
    last = min(rows.count, -((start - end) // stride)) - 1
    while first <= last:
        row = start + first * stride
        cut_begin, cut_end = max(begin, row), min(end, row + run)
        whole = cut_end - cut_begin == run
        # Whole rows are one overlap. Rows between the first and the last are always whole.
        count = last - first + (start + last * stride + run <= end) if whole and first < last else 1
        yield Overlap(
            run=cut_end - cut_begin,
            count=count,
            source=cut_begin - begin,
            source_stride=stride,
            target=first * run + cut_begin - row,
            target_stride=run,
        )
        first += count


def _with_same_stride(source: Segment, target: Segment) -> Iterator[Overlap]:
    """Yield the overlaps of two segments with equal strides, where a run of the source overlaps at most two runs of the target."""
    apart, stride = target.start - source.start, source.stride
    for shift in range((-target.run - apart) // stride + 1, -((apart - source.run) // stride)):  # target row - source row
        offset = apart + shift * stride
        begin, end = max(0, offset), min(source.run, offset + target.run)
        first, last = max(0, -shift), min(source.count, target.count - shift)
        if begin < end and first < last:
            yield Overlap(
                run=end - begin,
                count=last - first,
                source=first * source.run + begin,
                source_stride=source.run,
                target=(first + shift) * target.run + begin - offset,
                target_stride=target.run,
            )


def find_tiling_error(segments: Sequence[Segment]) -> str | None:
    """Check that distinct segments of one tensor cover each element exactly once.

    Returns:
        None if they do; else a description of the first error.
    """
    numel = segments[0].tensor_numel
    filled = [segment for segment in segments if segment.numel]
    if sum(segment.numel for segment in filled) == numel and len(filled) <= 1:
        return None
    fields = [[segment.start, segment.run, segment.stride, segment.count] for segment in filled]
    return find_tiling_error_of(torch.tensor(fields, dtype=torch.int64, device="cpu").reshape(len(filled), 4), numel)


def find_tiling_error_of(
    fields: Tensor,  # int64 (segments, 4) on the CPU: start, run, stride and count of each segment; none is empty
    numel: int,  # of the tensor
) -> str | None:
    """Do what `find_tiling_error` does, for segments as rows of numbers."""
    start, run, stride, count = fields.unbind(1)
    begin, end = 0, 0  # runs that start before `begin` are checked, and tile all elements before `end`
    while True:
        first = _runs_before(begin, start, stride, count)  # index of each segment's next run to check
        left = first < count
        next_start = int((start + first * stride)[left].min()) if left.any() else numel
        if next_start > end:
            return f"elements [{end}, {next_start}) of {numel} are held by no rank"
        if next_start < end:
            return f"element {next_start} of {numel} is held by two different pieces"
        if end == numel and not left.any():
            return None
        if end >= numel:
            return f"element {end} is held, but the tensor has {numel}"
        window = numel - end  # elements to check next; halved until the number of runs that start in it is within EXPANDED_AT_ONCE
        while int((last := _runs_before(end + window, start, stride, count)).sub(first).sum()) > EXPANDED_AT_ONCE and window > 1:
            window //= 2
        which = torch.arange(len(fields), device="cpu").repeat_interleave(last - first)
        number = torch.arange(len(which), device="cpu") - (last - first).cumsum(0).sub(last - first)[which] + first[which]
        starts, order = (start[which] + number * stride[which]).sort()
        ends = torch.cat([torch.tensor([end], device="cpu"), starts + run[which[order]]])
        wrong = (starts != ends[:-1]).nonzero()
        if len(wrong):
            begin, end = int(starts[wrong[0]]), int(ends[wrong[0]])
            if begin > end:
                return f"elements [{end}, {begin}) of {numel} are held by no rank"
            return f"element {begin} of {numel} is held by two different pieces"
        begin, end = end + window, int(ends[-1])


def _runs_before(element: int, start: Tensor, stride: Tensor, count: Tensor) -> Tensor:
    """For each segment, count its runs that begin before the element with this index."""
    return ((element - start + stride - 1) // stride).clamp(min=0).minimum(count)
