"""Segments name exactly the elements a shard holds, and shards that do not tile a tensor are found."""

from __future__ import annotations

import math
import resource
from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharded_optim.sharding import segment
from sharded_optim.sharding.segment import Segment, find_tiling_error, overlaps


def elements(segment: Segment) -> list[int]:
    return [segment.start + k * segment.stride + i for k in range(segment.count) for i in range(segment.run)]


@st.composite
def boxes(draw):
    """A shape, and a box in it."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    cut = [sorted((draw(st.integers(0, full)), draw(st.integers(0, full)))) for full in shape]
    return tuple(shape), tuple(low for low, _ in cut), tuple(high - low for low, high in cut)


@given(boxes())
def test_a_box_is_its_elements_or_is_refused_for_not_being_equal_runs(box) -> None:
    shape, offsets, sizes = box
    flat = torch.arange(math.prod(shape)).view(shape)
    expected = flat[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].flatten().tolist()
    starts = [index for index in expected if index - 1 not in expected]
    if len({b - a for a, b in pairwise(starts)}) > 1:
        with pytest.raises(ValueError, match=r"'w'.*not equally spaced runs"):
            Segment.box("w", shape, offsets, sizes)
    else:
        assert elements(Segment.box("w", shape, offsets, sizes)) == expected


@st.composite
def segments(draw, numel: int = 60):
    """Any segment of a tensor of so many elements."""
    run = draw(st.integers(0, numel))
    count = draw(st.integers(0, 12))
    stride = run + draw(st.integers(0, 12))
    reach = (count - 1) * stride + run if run * count else 0
    if reach > numel:
        run, stride, count, reach = min(run, numel), run, 1, min(run, numel)
    return Segment(name="w", shape=(numel,), start=draw(st.integers(0, numel - reach)), run=run, stride=stride, count=count)


@settings(deadline=None, max_examples=300)
@given(segments(), segments())
def test_overlaps_copies_each_common_element_once_and_nothing_else(source: Segment, target: Segment) -> None:
    ours, theirs = elements(source), elements(target)
    found = overlaps(source, target)
    assert sum(each.run * each.count for each in found) == len({*ours} & {*theirs})
    landed = torch.full((target.numel,), -1)
    for each in found:
        each.copy(torch.tensor(ours), landed)
    assert landed.tolist() == [index if index in ours else -1 for index in theirs]
    back = torch.full((source.numel,), -1)
    for each in found:
        each.reversed().copy(torch.tensor(theirs), back)
    assert back.tolist() == [index if index in theirs else -1 for index in ours]


@settings(deadline=None, max_examples=200)
@given(segments(), st.integers(1, 70))
def test_a_segment_is_cut_into_its_elements_in_order(segment: Segment, numel: int) -> None:
    parts = list(segment.cut(numel))
    assert [index for part in parts for index in elements(part)] == elements(segment)
    assert all(0 < part.numel <= numel for part in parts)


def test_the_designs_example() -> None:
    """Shard(1) of (5, 3) on rank 1 of 2."""
    segment = Segment.box("w", (5, 3), (0, 2), (5, 1))
    assert (segment.start, segment.run, segment.stride, segment.count) == (2, 1, 3, 5)


def test_equal_sets_of_elements_are_equal_segments() -> None:
    assert Segment(name="w", shape=(6,), start=1, run=2, stride=2, count=2) == Segment.flat("w", (6,), 1, 4)
    assert Segment(name="w", shape=(6,), start=3, run=2, stride=5, count=1) == Segment.flat("w", (6,), 3, 2)
    assert Segment.flat("w", (6,), 4, 0) == Segment.flat("w", (6,), 0, 0)
    assert Segment.whole("w", ()).numel == 1


@pytest.mark.parametrize(
    ("extent", "words"),
    [((5, 2, 2, 1), "reaches beyond"), ((0, 2, 1, 2), "overlap"), ((-1, 2, 2, 1), "negative"), ((0, 1, 3, 3), "reaches beyond")],
)
def test_impossible_segments_are_refused(extent: tuple[int, int, int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Segment(name="w", shape=(6,), **dict(zip(("start", "run", "stride", "count"), extent, strict=True)))


@given(st.integers(0, 40), st.lists(st.integers(0, 40), max_size=5))
def test_consecutive_cuts_tile(numel: int, cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, numel) for cut in cuts), numel]
    pieces = [Segment.flat("w", (numel,), low, high - low) for low, high in pairwise(bounds)]
    assert find_tiling_error(pieces) is None


@given(st.integers(1, 7), st.integers(1, 7), st.data())
def test_columns_and_rows_tile_and_any_hole_or_overlap_is_found(rows: int, columns: int, data) -> None:
    row, column = data.draw(st.integers(0, rows)), data.draw(st.integers(0, columns))
    pieces = [
        Segment.box("w", (rows, columns), (r, c), (height, width))
        for r, height in ((0, row), (row, rows - row))
        for c, width in ((0, column), (column, columns - column))
    ]
    assert find_tiling_error(pieces) is None
    filled = [piece for piece in pieces if piece.numel]
    lost = data.draw(st.sampled_from(filled))
    assert "held by no rank" in (
        find_tiling_error([p for p in pieces if p is not lost] or [Segment.flat("w", (rows, columns), 0, 0)]) or ""
    )
    extra = Segment.flat("w", (rows, columns), data.draw(st.integers(0, rows * columns - 1)), 1)
    if extra not in filled:
        assert "held by two" in (find_tiling_error([*pieces, extra]) or "")


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_a_tiling_is_checked_in_parts_as_at_once(rows: int, columns: int, data) -> None:
    """Columns of several widths, cut into several heights; whole, with one lost, and with one twice."""
    pieces = []
    bounds = [0, *sorted(data.draw(st.lists(st.integers(0, columns), max_size=3))), columns]
    for begin, end in pairwise(bounds):
        cuts = [0, *sorted(data.draw(st.lists(st.integers(0, rows), max_size=3))), rows]
        pieces += [Segment.box("w", (rows, columns), (top, begin), (bottom - top, end - begin)) for top, bottom in pairwise(cuts)]
    pieces = [piece for piece in pieces if piece.numel]
    one = data.draw(st.sampled_from(pieces))
    for case in (pieces, [piece for piece in pieces if piece is not one] or [Segment.flat("w", (rows, columns), 0, 0)], [*pieces, one]):
        with mock.patch.object(segment, "EXPANDED_AT_ONCE", data.draw(st.integers(1, 5))):
            found = find_tiling_error(case)
        assert found == find_tiling_error(case)
        assert (found is None) == (case is pieces)


def test_a_tiling_of_many_short_runs_takes_little_memory() -> None:
    """16 columns of a width of 1: 8 Mi runs, which at once would take 400 MB."""
    rows = 2**19
    pieces = [Segment.box("w", (rows, 16), (0, column), (rows, 1)) for column in range(16)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert find_tiling_error(pieces) is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # KiB
