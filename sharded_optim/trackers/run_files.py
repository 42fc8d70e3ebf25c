"""Files in the folder of a run, which the tracker `jsonl` and the training job write, and `sharded-optim report` and `watch` read.

`metrics.jsonl` has one JSON object per line, each with the `step` that its other values are of; its lines are parsed here and nowhere
else. `summary.json` has the `status` of the run.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sharded_optim.trackers.atomic_write import write_text

__all__ = ["FINISHED", "METRICS", "RUNNING", "SUMMARY", "append_record", "keep_records", "parse_record", "read_records", "to_json"]

METRICS, SUMMARY = "metrics.jsonl", "summary.json"
# Of the `status`; others say how a run was interrupted.
RUNNING = "running or interrupted"  # a run that is killed cannot write down that it is
FINISHED = "finished"


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record in one write, so that a killed process leaves at most one incomplete line, the last."""
    line = (to_json(record) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        while line:
            line = line[os.write(descriptor, line) :]
    finally:
        os.close(descriptor)


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line, with None where a value was not finite; None for a line that a killed process left incomplete."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return all records of a file; none if there is no file."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [record for line in lines if (record := parse_record(line)) is not None]


def keep_records(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Drop the records of steps after `last_step`, which are going to be taken again, and return the others."""
    records = [record for record in read_records(path) if record["step"] <= last_step]
    if path.exists():
        write_text(path, "".join(to_json(record) + "\n" for record in records))
    return records


def to_json(record: Mapping[str, Any], indent: int | None = None) -> str:
    """Return a record as JSON, which has no NaN and no infinity: they become null, also in dicts inside."""
    return json.dumps(_finite(record), allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
