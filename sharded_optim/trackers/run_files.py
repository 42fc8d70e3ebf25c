"""Files in the folder of a run, which the tracker `jsonl` and the training job write, and `sharded-optim report` and `watch` read.

`metrics.jsonl` has one JSON object per line, with a `step` and values of that step; only this file parses its lines. `summary.json` has the
`status` of the run.
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
# Values of `status`; any other value says how a run was interrupted.
RUNNING = "running or interrupted"  # one value for both, as a killed run cannot change its status
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
    """Parse a line into a record, with None for values that were not finite; None for a malformed line, as a killed process may leave."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return all records of a file; an empty list if there is no file."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [record for line in lines if (record := parse_record(line)) is not None]


def keep_records(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Remove the records of steps after `last_step` from a file, as these steps are taken again, and return the remaining records."""
    records = [record for record in read_records(path) if record["step"] <= last_step]
    if path.exists():
        write_text(path, "".join(to_json(record) + "\n" for record in records))
    return records


def to_json(record: Mapping[str, Any], indent: int | None = None) -> str:
    """Return a record as JSON. NaN and infinity, which JSON does not have, become null, also in nested dicts."""
    return json.dumps(_finite(record), allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
