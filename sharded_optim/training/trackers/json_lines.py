"""JSON lines: one record per line in `<folder>/<run>/metrics.jsonl`, and the config in `config.json` beside it. Needs no package.

`to_json` and `read_records` also serve the run folder of the training job (`launch/run_folder.py`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sharded_optim.training.trackers.destination import Destination, Run, Status, replace_file

__all__ = ["DESTINATION", "append_line", "read_records", "to_json"]


class JsonLines:
    """Append a line `{"step": 10, "loss": 1.5, ...}` for each call of `log`. What is not finite is null.

    A resumed run drops the records after the step that it resumes after. A new run renames the file of an earlier one to
    `metrics-1.jsonl`, or the first number that is free.
    """

    def __init__(self, run: Run) -> None:
        self._path = run.path / "metrics.jsonl"
        if run.resume_after is None:
            _set_aside(self._path)
        else:
            kept = [record for record in read_records(self._path) if record["step"] <= run.resume_after]
            replace_file(self._path, "".join(to_json(record) + "\n" for record in kept))
        replace_file(run.path / "config.json", json.dumps(run.config, indent=2, default=str) + "\n")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        append_line(self._path, {"step": step, **values})

    def finish(self, status: Status) -> None:
        """Nothing is left to write: `log` has written whole lines."""


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record in one write, so that a killed process leaves at most one incomplete line, the last."""
    line = (to_json(record) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        while line:
            line = line[os.write(descriptor, line) :]
    finally:
        os.close(descriptor)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file that have a step; none if there is no file. Lines that a killed process left incomplete are dropped."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def to_json(record: Mapping[str, Any], indent: int | None = None) -> str:
    """Return a record as JSON, which has no NaN and no infinity: they become null, also in dicts inside."""
    return json.dumps(_finite(record), allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _set_aside(path: Path) -> None:
    if path.exists():
        number = 1
        while (older := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
            number += 1
        path.rename(older)


DESTINATION = Destination(opens=JsonLines)
