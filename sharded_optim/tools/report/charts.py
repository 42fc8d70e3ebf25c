"""Charts, tables and notes: the content of the sections of a report.

`sections/` makes them from runs, `drawing.py` draws the charts, and `page.py` puts all in a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Chart", "HeatMap", "Item", "LineChart", "Note", "Section", "Series", "Table"]


@dataclass(frozen=True, kw_only=True)
class Series:
    """A curve: values over steps."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]  # NaN: not finite
    color: int  # index into the palette, modulo its size
    dash: int = 0  # index of the line pattern, modulo the number of patterns
    markers: bool = False  # a mark at each value, for few values
    faint: bool = False  # drawn faintly, for many values behind other curves


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """Series in one pair of axes."""

    key: str  # unique in the page; the stem of the PNG
    title: str
    explanation: str  # a sentence below the title
    unit: str  # label of the y axis
    series: Sequence[Series]
    levels: Sequence[tuple[str, float]] = ()  # horizontal lines, by name
    marked: Sequence[tuple[str, Sequence[int]]] = ()  # steps marked at the upper edge, by name
    log: bool = False
    from_zero: bool = False  # the y axis begins at 0
    stacked: bool = False  # the series, which have the same steps, are drawn on top of each other as parts of a whole


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """A value of each tensor over steps, drawn below the loss of the same steps."""

    key: str  # unique in the page; the stem of the PNG
    title: str
    explanation: str
    unit: str  # label of the color scale
    steps: Sequence[int]  # (columns,), equally far apart
    rows: Sequence[str]
    values: NDArray[np.float64]  # (rows, columns); NaN: no finite value
    loss: Series
    spikes: Sequence[int]  # steps to mark
    spikes_name: str
    summary: Table  # table behind the figure, instead of one with all values


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells of text. The first column names the row."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: Sequence[int] = ()  # indices of rows that differ between runs


@dataclass(frozen=True)
class Note:
    """A sentence: the reason why a figure is left out, or a remark on a run."""

    text: str


Chart: TypeAlias = LineChart | HeatMap
Item: TypeAlias = Chart | Table | Note


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and its content."""

    key: str  # anchor in the page
    title: str
    items: list[Item] = field(default_factory=list)
