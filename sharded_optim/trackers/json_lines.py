"""JSON lines: one record per line in `<folder>/<run>/metrics.jsonl`, with files for config and status beside it. Needs no package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from sharded_optim.trackers.atomic_write import write_text
from sharded_optim.trackers.destination import Destination, Run, Status
from sharded_optim.trackers.run_files import METRICS, RUNNING, SUMMARY, append_record, keep_records

__all__ = ["DESTINATION"]


class JsonLines:
    """Append a line `{"step": 10, "loss": 1.5, ...}` for each call of `log`. Values that are not finite become null.

    A resumed run drops the records of steps after `resume_after`. A new run renames the file of an earlier run to `metrics-1.jsonl`, or
    the first number that is free. `config.json` has the config, and `summary.json` the status.
    """

    def __init__(self, run: Run) -> None:
        self._path = run.path / METRICS
        if run.resume_after is None:
            _set_aside(self._path)
        else:
            keep_records(self._path, run.resume_after)
        write_text(run.path / "config.json", json.dumps(run.config, indent=2, default=str) + "\n")
        self._write_status(RUNNING)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        append_record(self._path, {"step": step, **values})

    def finish(self, status: Status) -> None:
        self._write_status(status)

    def _write_status(self, status: str) -> None:
        write_text(self._path.with_name(SUMMARY), json.dumps({"status": status}) + "\n")


def _set_aside(path: Path) -> None:
    if path.exists():
        number = 1
        while (older := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
            number += 1
        path.rename(older)


DESTINATION = Destination(opens=JsonLines)
