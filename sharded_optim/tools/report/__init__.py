"""Reports of training runs: a self-contained HTML page, and PNGs of its charts. Used by `sharded-optim report`.

Importing this package needs neither matplotlib nor Jinja2; `write_report` does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sharded_optim.tools.imported import MissingPackageError
from sharded_optim.tools.runs import RunFolderError, find_run, labels_of, read_run
from sharded_optim.trackers.atomic_write import write_text

__all__ = ["write_report"]

PACKAGES = {"matplotlib": "matplotlib", "jinja2": "jinja2", "yaml": "pyyaml"}


def write_report(
    paths: Sequence[str | Path], *, output: str | Path | None = None, png: str | Path | None = None, refresh: int | None = None
) -> tuple[Path, list[Path]]:
    """Write a page about one run, or about several runs side by side.

    Args:
        paths: run folders, which may be written to meanwhile.
        output: the path of the page; None: `report.html` in the first run folder.
        png: a folder for a PNG of each chart, created if it is missing; None writes no PNG.
        refresh: seconds after which a browser loads the page again; None: never.

    Returns:
        The paths of the page and of the PNGs.

    Raises:
        RunFolderError: a path is no run folder, is given twice, or has no record of training yet.
        MissingPackageError: a package is not installed.
        ValueError: refresh is below 1.
    """
    if refresh is not None and refresh < 1:
        raise ValueError(f"refresh is the number of seconds after which the page is loaded again, at least 1, not {refresh}")
    found = [find_run(path) for path in paths]
    for index, path in enumerate(found):
        if path in found[:index]:
            raise RunFolderError(f"{str(path)!r} is given twice; give each run once")
    try:
        from sharded_optim.tools.report import drawing, page
        from sharded_optim.tools.report.charts import HeatMap, LineChart
        from sharded_optim.tools.report.sections import sections_of
    except ImportError as error:
        package = (error.name or "").split(".")[0]
        if package not in PACKAGES:
            raise
        others = " ".join(PACKAGES.values())
        raise MissingPackageError(f"a report needs {PACKAGES[package]}, which is not installed; pip install {others}") from error
    runs = [read_run(path) for path in found]
    for run in runs:
        if not run.records.training:
            raise RunFolderError(f"{str(run.path)!r} has no record of training yet")
    labels = labels_of(found)
    sections = sections_of(dict(zip(labels, runs, strict=True)))
    target = found[0] / "report.html" if output is None else Path(output)
    pngs: list[Path] = []
    if png is not None:
        Path(png).mkdir(parents=True, exist_ok=True)
        for chart in (item for section in sections for item in section.items if isinstance(item, LineChart | HeatMap)):
            path = _unused(Path(png), chart.key, pngs)
            drawing.draw_png(chart, path)
            pngs.append(path)
    write_text(target, page.page_of(sections, labels, refresh=refresh))  # atomic, as a browser may load the page at any time
    return target, pngs


def _unused(folder: Path, key: str, used: Sequence[Path]) -> Path:
    """Return an unused path for a chart's PNG: the chart's key, with `_` for characters that a file name may not have."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", key)
    count = 1
    while (path := folder / (f"{stem}.png" if count == 1 else f"{stem}-{count}.png")) in used:
        count += 1
    return path
