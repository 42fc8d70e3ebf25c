"""The one style of the figures in docs/: transparent, with ink and colors that are read on white and on black."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BROWN", "COLORS", "DOCS", "GRAY", "GREEN", "INK", "OURS", "RED", "RESULTS", "VIOLET", "label_bars", "legend", "new", "save"]

DOCS = Path(__file__).resolve().parents[1]
RESULTS = DOCS.parent / "benchmarks" / "results"
INK = "#7a828c"  # a contrast of 3.9 : 1 with white and with the site's black
# After Okabe and Ito, whom people with any color vision tell apart; each with a contrast of 3 : 1 or more with both.
OURS, RED, GREEN, VIOLET, BROWN, GRAY = COLORS = ("#1f83c4", "#d1495b", "#1f9160", "#a765b5", "#ad7a00", "#858d97")


def new(width: float = 8, height: float = 3.4, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure, and its axes."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state as in pyplot
    from matplotlib.figure import Figure

    colors = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    sizes = {"font.size": 10, "axes.titlesize": 11, "legend.fontsize": 9, "legend.frameon": False, "lines.linewidth": 2}
    shape = {"axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none", "figure.facecolor": "none"}
    settings: Any = {**colors, **sizes, **shape, "legend.labelcolor": INK, "grid.color": INK, "grid.alpha": 0.25}
    with rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, **options)
    return figure, axes


def legend(axes: Axes, **options: Any) -> None:
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, **options)


def label_bars(axes: Axes, places: Sequence[float], values: Sequence[float], texts: Sequence[str]) -> None:
    """Write a text at the end of each horizontal bar."""
    for place, value, text in zip(places, values, texts, strict=True):
        axes.annotate(text, (value, place), (4, 0), textcoords="offset points", va="center", color=INK, fontsize=9)


def save(figure: Figure, name: str) -> None:
    """Write docs/NAME.png."""
    path = DOCS / f"{name}.png"
    figure.savefig(path, dpi=144, transparent=True)
    print(f"{path.relative_to(DOCS.parent)}")
