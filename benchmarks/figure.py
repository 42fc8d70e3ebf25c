"""Draws the ratios of a run: a panel for each case, a bar for each contender. Imports matplotlib only when asked to draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.contenders import OURS
from benchmarks.records import CaseRecord, Run
from benchmarks.report import contender_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

COLUMNS = 3
LEAST, MOST = 0.4, 16  # ratios; a bar that is longer ends here, and its number tells
# Okabe and Ito's palette, which the colour-blind can tell apart; bars are labelled besides.
COLORS = {OURS: "#0072B2", "torch": "#999999", "optimi": "#E69F00", "deepspeed": "#CC79A7"}
OTHER = "#009E73"
STABLE = "///"  # hatching of StableAdamW


def draw(path: Path, run: Run) -> None:
    """Write a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state as in pyplot
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    groups: dict[tuple[bool, str], list[CaseRecord]] = {}
    for case in [case for case in run.cases if case.results]:
        groups.setdefault((_is_few(case, run), case.dtype), []).append(case)
    rows = [row for _, group in sorted(groups.items(), key=lambda item: item[0][0]) for row in _rows(group)]
    names_of_rows = [_names(row, run) for row in rows]
    heights = [0.24 * len(names) + 0.9 for names in names_of_rows]
    figure = Figure(figsize=(5.0 + 3.2 * (COLUMNS - 1), sum(heights) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), COLUMNS, squeeze=False, height_ratios=heights)
    for row, names, axes_row in zip(rows, names_of_rows, grid, strict=True):
        for index, axes in enumerate(axes_row):
            if index < len(row):
                _panel(axes, row[index], names, labelled=index == 0, percent=run.on_gpu)
            else:
                axes.set_visible(False)
    libraries = [name for name in COLORS if any(result.library == name for case in run.cases for result in case.results)]
    handles = [Patch(facecolor=COLORS[name], label=name) for name in libraries]
    handles.append(Patch(facecolor="white", edgecolor="black", hatch=STABLE, label="StableAdamW"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    place = run.environment["gpu"] or f"{run.environment['cpu']}, {run.environment['threads']} threads"
    percent = "; beside it percent of the bandwidth of a copy" if run.on_gpu else ""
    title = f"Time of a step, ratio to {run.baseline}; left of 1 is faster{percent}"
    figure.suptitle(f"{title}\n{place}, {run.environment['date'][:10]}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _rows(cases: list[CaseRecord]) -> list[list[CaseRecord]]:
    """Rows of at most `COLUMNS`, as equally long as can be."""
    count = -(-len(cases) // COLUMNS)
    length = -(-len(cases) // count)
    return [cases[first : first + length] for first in range(0, len(cases), length)]


def _names(cases: Sequence[CaseRecord], run: Run) -> list[str]:
    """Those of whom there is something to draw."""
    return [name for name in contender_names(cases, run.contenders) if any(case.of(name) for case in cases)]


def _is_few(case: CaseRecord, run: Run) -> bool:
    """Whether it belongs to a pair that compares many tensors with one."""
    return case.same_elements is not None or any(case.name == other.same_elements for other in run.cases)


def _panel(axes: Axes, case: CaseRecord, names: list[str], *, labelled: bool, percent: bool) -> None:
    positions = {name: len(names) - 1 - index for index, name in enumerate(names)}
    for result in case.results:
        hatch = STABLE if result.algorithm == "StableAdamW" else None
        position = positions[result.contender]
        end = min(max(result.ratio, LEAST), MOST)
        color = COLORS.get(result.library, OTHER)
        axes.barh(position, end - 1, left=1, height=0.72, color=color, hatch=hatch, edgecolor="white")
        text = f"{result.ratio:.2f}" if result.ratio <= MOST else f"{result.ratio:.0f} (cut)"
        text += f"   {result.percent_of_stream:.0f} %" if percent else ""
        axes.annotate(text, (max(end, 1.0), position), (3, 0), textcoords="offset points", va="center", fontsize=8)
    for name in set(names) - {result.contender for result in case.results}:
        axes.annotate("not measured", (1.0, positions[name]), (3, 0), textcoords="offset points", va="center", fontsize=7, color="#777777")
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(LEAST, 4 * MOST)  # room for numbers
    ticks = (0.5, 1, 2, 4, 8, 16)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_yticks(list(positions.values()), list(positions) if labelled else [""] * len(names), fontsize=8)
    axes.set_title(case.title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
