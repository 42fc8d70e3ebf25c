"""Draw charts with matplotlib: as SVG for a page, in the colors of the reader's scheme, and as PNG. Used by `sharded_optim.tools.report`.

Every chart is drawn twice for a page, for wide and for narrow windows: one drawing scaled down to a phone would have letters of 4 pixels.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state as in pyplot
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogFormatter, MaxNLocator, NullLocator

from sharded_optim.tools.report.charts import Chart, HeatMap, LineChart, Series
from sharded_optim.tools.report.palette import LIGHT, PLACEHOLDERS, series_name
from sharded_optim.tools.runs import printable
from sharded_optim.trackers.atomic_write import atomic_write

__all__ = ["NARROW", "WIDE", "Drawing", "draw_png", "draw_svg"]

DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (9, 3)), (0, (3, 1.5, 1, 1.5, 1, 1.5)))
MOST_POINTS = 3000  # points of a drawn line; longer lines are thinned to the smallest and largest of neighbours
PNG_DPI = 110
SVG_DPI = 72  # so that a unit of the SVG is a point
LEAST_RMS, MOST_RMS = 0.1, 3.0  # the color scale of a heat map covers at least this range


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of drawings for windows of one width."""

    width: float  # inches
    font: float  # points
    legend_columns: int
    name_length: int  # characters of tensors' names; 0 shows row numbers instead, which the table below has too


WIDE = Size(width=8.8, font=8.5, legend_columns=4, name_length=30)
NARROW = Size(width=3.7, font=8.5, legend_columns=1, name_length=0)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """An SVG for use inside an HTML page, without namespaces and with ids that are unique in the page.

    Attributes:
        left, right, top, bottom: edges of the data area of the lowest axes, as shares of the drawing's size from its left and top.
        first, last: steps at the left and the right edge of the data area.
    """

    svg: str
    left: float
    right: float
    top: float
    bottom: float
    first: float
    last: float


def draw_svg(chart: Chart, size: Size, prefix: str) -> Drawing:
    """Draw a chart for a page.

    Args:
        prefix: the prefix of all ids in the drawing, as a page has several drawings.
    """
    with rc_context(_settings(size, PLACEHOLDERS)):
        figure, axes = _drawn(chart, size, PLACEHOLDERS)
        buffer = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        place = axes.get_position()
        first, last = axes.get_xlim()
    svg = _as_html(buffer.getvalue(), prefix)
    return Drawing(svg=svg, left=place.x0, right=place.x1, top=1.0 - place.y1, bottom=1.0 - place.y0, first=first, last=last)


def draw_png(chart: Chart, path: Path) -> None:
    """Draw a chart as a PNG in light colors. The file is replaced atomically."""
    with rc_context(_settings(WIDE, LIGHT)):
        figure, _ = _drawn(chart, WIDE, LIGHT, title=True)
        FigureCanvasAgg(figure)
        with atomic_write(path) as draft:
            figure.savefig(draft, dpi=PNG_DPI, format="png")


def _settings(size: Size, colors: Mapping[str, str]) -> Any:  # matplotlib types the keys of its settings one by one
    return {
        "figure.dpi": SVG_DPI,
        "figure.facecolor": colors["surface"],
        "text.color": colors["ink"],
        "axes.facecolor": "none",
        "axes.edgecolor": colors["muted"],
        "axes.labelcolor": colors["ink"],
        "axes.axisbelow": True,
        "xtick.color": colors["muted"],
        "xtick.labelcolor": colors["ink"],
        "ytick.color": colors["muted"],
        "ytick.labelcolor": colors["ink"],
        "grid.color": colors["grid"],
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "font.size": size.font,
        "font.family": "DejaVu Sans",
        "text.parse_math": False,  # names may have dollar signs
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "sharded_optim",  # the same drawing has the same ids, so that pages can be compared
        "axes.spines.top": False,
        "axes.spines.right": False,
        "path.simplify": True,
        "path.simplify_threshold": 0.2,
    }


# ------------------------------------------------------------------------------------------------------------------------- drawing


def _drawn(chart: Chart, size: Size, colors: Mapping[str, str], *, title: bool = False) -> tuple[Figure, Axes]:
    """Draw a chart; return the figure, and the axes whose position a page needs."""
    figure = Figure(figsize=(size.width, _height(chart, size)), layout="constrained")
    if title:
        figure.suptitle(printable(chart.title), fontsize=size.font + 2)
    if isinstance(chart, HeatMap):
        axes = _draw_heat_map(figure, chart, size, colors)
    else:
        axes = figure.add_subplot()
        draw = _draw_stack if chart.stacked else _draw_lines
        draw(axes, chart, colors)
    _draw_legend(figure, size)
    return figure, axes


def _height(chart: Chart, size: Size) -> float:
    wide = size is WIDE
    if isinstance(chart, HeatMap):
        return 1.9 + min(14.0, max(1.2, len(chart.rows) * (0.115 if wide else 0.06)))
    entries = len(chart.series) + len(chart.levels)
    return (2.6 if not wide else 3.0 if chart.stacked else 3.2) + 0.17 * -(-entries // size.legend_columns)


def _draw_lines(axes: Axes, chart: LineChart, colors: Mapping[str, str]) -> None:
    for each in chart.series:
        _draw_series(axes, each, colors)
    for index, (name, value) in enumerate(chart.levels):
        axes.axhline(value, color=colors["muted"], linewidth=1.0, linestyle=DASHES[1 + index % 2], label=f"{printable(name)} {value:.4g}")
    for name, steps in chart.marked:
        if steps:
            transform = axes.get_xaxis_transform()
            axes.plot(steps, [0.98] * len(steps), "v", color=colors["alarm"], markersize=5, transform=transform, label=printable(name))
    values = [value for each in chart.series for value in each.values]
    if chart.log and all(value > 0.0 for value in values if np.isfinite(value)) and np.isfinite(values).any():
        axes.set_yscale("log")
        # The default formatters write mathematical markup, which is not parsed here.
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
    elif chart.from_zero:
        axes.set_ylim(bottom=0.0)
        if not any(np.isfinite(value) and value for value in values):
            axes.set_ylim(top=1.0)
    _finish(axes, chart.unit)


def _draw_series(axes: Axes, series: Series, colors: Mapping[str, str]) -> None:
    steps, values = _extremes(np.asarray(series.steps, dtype=float), np.asarray(series.values, dtype=float))
    alone = len(steps) == 1  # a line of one point would be invisible
    axes.plot(
        steps,
        values,
        color=colors[series_name(series.color)],
        linestyle=DASHES[series.dash % len(DASHES)],
        linewidth=1.1 if series.faint else 1.5,
        alpha=0.7 if series.faint else 1.0,
        marker="o" if series.markers or alone else None,
        markersize=4,
        label=_label(series.name),
    )


def _extremes(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Thin a line to MOST_POINTS, without losing a peak."""
    if len(steps) <= MOST_POINTS:
        return steps, values
    kept: set[int] = {0, len(steps) - 1}
    for part in np.array_split(np.arange(len(steps)), MOST_POINTS // 2):
        finite = part[np.isfinite(values[part])]
        kept |= {int(finite[np.argmin(values[finite])]), int(finite[np.argmax(values[finite])])} if len(finite) else {int(part[0])}
    index = np.array(sorted(kept))
    return steps[index], values[index]


def _draw_stack(axes: Axes, chart: LineChart, colors: Mapping[str, str]) -> None:
    values = np.nan_to_num(np.array([each.values for each in chart.series], dtype=float))
    axes.stackplot(
        chart.series[0].steps,
        values,
        labels=[_label(each.name) for each in chart.series],
        colors=[colors[series_name(each.color)] for each in chart.series],
        linewidth=0.0,
    )
    totals = values.sum(axis=0)
    usual = 1.5 * float(np.percentile(totals, 95)) if totals.size else 0.0
    # The first step, which compiles kernels, and a few late ones must not take most of the scale.
    axes.set_ylim(0.0, usual if 0.0 < usual < totals.max() else None)
    _finish(axes, chart.unit)


def _draw_heat_map(figure: Figure, chart: HeatMap, size: Size, colors: Mapping[str, str]) -> Axes:
    rows = len(chart.rows)
    height = figure.get_figheight()
    grid = figure.add_gridspec(2, 2, width_ratios=[40, 1], height_ratios=[1.15, height - 1.9])
    axes, scale = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
    above = figure.add_subplot(grid[0, 0], sharex=axes)
    apart = chart.steps[1] - chart.steps[0] if len(chart.steps) > 1 else 1
    extent = (chart.steps[0] - apart / 2, chart.steps[-1] + apart / 2, rows - 0.5, -0.5)
    finite = chart.values[np.isfinite(chart.values) & (chart.values > 0.0)]
    # The scale begins at LEAST_RMS, or at the first percentile if that is lower, as a few values near zero must not take most of it.
    least = min(LEAST_RMS, float(np.percentile(finite, 1))) if len(finite) else LEAST_RMS
    most = max([MOST_RMS, *finite.tolist()])
    # Zero has no logarithm; NaN stays without a color.
    shown = np.where(chart.values <= least, least, chart.values)
    image = axes.imshow(shown, norm=LogNorm(least, most), cmap="viridis", aspect="auto", extent=extent, interpolation="none")
    bar = figure.colorbar(image, cax=scale)
    ticks = [tick for tick in (0.01, 0.1, 0.3, 1.0, 2.3, 10.0, 100.0, 1e3, 1e4) if least <= tick <= most]
    bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    bar.set_label(chart.unit)
    bar.outline.set_visible(False)  # type: ignore[operator]  # a Spine, whatever the stub says
    if size.name_length:
        axes.set_yticks(range(rows), [_short(name, size.name_length) for name in chart.rows], fontsize=6.5)
    else:
        places = list(range(0, rows, max(1, rows // 8)))
        axes.set_yticks(places, [str(place + 1) for place in places])
    _finish(axes, "" if size.name_length else "row of the table", grid=False)
    _draw_series(above, chart.loss, colors)
    if chart.spikes:
        for step in chart.spikes:
            above.axvline(step, color=colors["alarm"], linewidth=0.6, alpha=0.6)
        transform = above.get_xaxis_transform()
        label = f"{chart.spikes_name}, {len(chart.spikes)}"
        above.plot(chart.spikes, [0.94] * len(chart.spikes), "v", color=colors["alarm"], markersize=5, transform=transform, label=label)
    _finish(above, "loss")
    axes.set_xlim(extent[:2])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8 if size is WIDE else 4))
    above.set_xlabel("")
    above.tick_params(labelbottom=False)
    return axes


def _finish(axes: Axes, unit: str, *, grid: bool = True) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins="auto"))
    axes.grid(grid)


def _draw_legend(figure: Figure, size: Size) -> None:
    found = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    if found:
        handles, labels = zip(*found, strict=True)
        longest = max(map(len, labels))
        # As many columns as fit into a line of text, so that long names do not run out of the figure.
        columns = max(1, min(size.legend_columns, int(size.width * 15) // (longest + 6)))
        figure.legend(handles, labels, loc="outside lower left", ncols=columns)


def _label(name: str) -> str:
    """Shorten a name for a legend. A zero-width space hides a leading underscore, as matplotlib would leave out the name."""
    short = _short(name, 44)
    return f"\u200b{short}" if short.startswith("_") else short


def _short(name: str, length: int) -> str:
    """Shorten a long name by leaving out its middle."""
    name = printable(name)
    return name if len(name) <= length else f"{name[: length // 2 - 1]}\u2026{name[len(name) - length // 2 :]}"


# ----------------------------------------------------------------------------------------------------------------------------- SVG


def _as_html(svg: bytes, prefix: str) -> str:
    """Convert an SVG for use inside an HTML page: no namespaces, ids with a prefix, colors from the page's style."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):  # matplotlib's style selects `*`, which would be the whole page
                parent.remove(child)
    variables = {value: f"var(--{name})" for name, value in PLACEHOLDERS.items()}
    pattern = re.compile("|".join(variables))
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(name): value for name, value in element.attrib.items()}
        element.attrib.clear()
        for name, value in attributes.items():
            if name == "id":
                value = f"{prefix}{value}"
            elif name == "href" and value.startswith("#"):
                value = f"#{prefix}{value[1:]}"
            else:
                value = value.replace("url(#", f"url(#{prefix}")
                # All colors are in `style`, the only attribute in which CSS variables work.
                value = pattern.sub(lambda match: variables[match.group()], value)
            element.set(name, value)
    for name in ("width", "height", "version"):  # the page's style sets the size
        root.attrib.pop(name, None)
    root.set("aria-hidden", "true")  # the figure has a description for screen readers
    root.set("focusable", "false")
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """Return a name without its namespace."""
    return name.rpartition("}")[2]
