"""Read the folder of a training run, also during the run: records, config and summary. Used by `sharded-optim report` and `watch`.

`metrics.jsonl` has one JSON object per line, in which null stands for a value that was not finite. Two programs write it:

    the training job     records of training, with a `train_loss_bits` and the optimizer's metrics as `optimizer`, and of validation, with
                         a `val_bits_per_byte`; `config.yaml`
    the tracker `jsonl`  whatever is logged, as `loss`, `validation_loss` and the optimizer's metrics, in one or several lines for a step;
                         `config.json`

Config and `summary.json` may be missing in a run that has just begun.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sharded_optim.tools.imported import MissingPackageError
from sharded_optim.trackers.run_files import FINISHED, METRICS, SUMMARY, parse_record

__all__ = [
    "FINISHED",
    "REFERENCE_LOSSES",
    "Follower",
    "Records",
    "Run",
    "RunFolderError",
    "TrainingRecord",
    "ValidationRecord",
    "find_run",
    "labels_of",
    "printable",
    "read_run",
]

CONFIG, TRACKER_CONFIG = "config.yaml", "config.json"  # written by the training job, and by the tracker
REFERENCE_LOSSES = (("unigram", "unigram_bits_per_byte"), ("zlib", "zlib_bits_per_byte"))  # names, and keys of the training job's summary
NAMED_FOLDERS = 8  # most folders that an error names
COMPARED_BYTES = 256  # before the offset at which reading continues, to recognize a replaced file


class RunFolderError(ValueError):
    """A path is no run folder, or a run folder has no records."""


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """A record of the training steps up to `step`. Missing values are None; values that were not finite are NaN."""

    step: int
    loss: float | None  # in `Records.loss_unit`; in the training job the mean over the steps since the record before
    lr: float | None
    tokens_per_second: float | None  # of all ranks
    largest_rms: float | None
    largest_rms_name: str | None  # the tensor of that RMS
    skipped_steps: int | None  # since the job was started or resumed
    optimizer: dict[str, float]  # `metrics()` and `performance()` of the step, or other logged values; empty if the record has none
    non_finite_ranks: dict[str, list[int]]  # ranks that held a non-finite piece, by tensor; empty if the record has none

    def by_name(self, kind: str) -> dict[str, float]:
        """Return the optimizer's values of one kind by name: for `rms` the values of all keys `rms/NAME`, by NAME."""
        prefix = f"{kind}/"
        return {key.removeprefix(prefix): value for key, value in self.optimizer.items() if key.startswith(prefix)}


@dataclass(frozen=True, kw_only=True)
class ValidationRecord:
    """The loss of the validation set after a step."""

    step: int
    loss: float  # in `Records.loss_unit`


@dataclass
class Records:
    """Records in the order of steps. If a resumed run has repeated steps, their new records replace the old ones."""

    training: list[TrainingRecord] = field(default_factory=list)
    validation: list[ValidationRecord] = field(default_factory=list)
    restarts: list[int] = field(default_factory=list)  # first recorded step after each restart that metrics.jsonl shows
    unreadable: int = 0  # complete lines that are no record
    loss_unit: str = ""  # "bits per byte" in the training job; "" for a tracker, whose unit is unknown
    _last: dict[str, Any] = field(default_factory=dict)  # content of all lines of the last training record

    def add(self, line: bytes) -> None:
        """Add one line of metrics.jsonl, without its newline."""
        if not line.strip():
            return
        content = parse_record(line) or {}
        training, validation = _training_record(content), _validation_record(content)
        if training is not None:
            self._add_training(training, content)
        if validation is not None:
            self._add_validation(validation)
        self.unreadable += training is None and validation is None
        if {"train_loss_bits", "val_bits_per_byte"} & content.keys():
            self.loss_unit = "bits per byte"

    def _add_training(self, record: TrainingRecord, content: dict[str, Any]) -> None:
        if self.training and record.step == self.training[-1].step and self._last.keys() & content.keys() == {"step"}:
            # The line has further values of the same step. If it repeated a value, the step would have been taken again.
            self._last |= content
            merged = _training_record(self._last)
            assert merged is not None, "each of its lines is a record"
            self.training[-1] = merged
            return
        if self.training and record.step <= self.training[-1].step:
            self._drop_from(record.step)
            self.restarts.append(record.step)
        self.training.append(record)
        self._last = content

    def _add_validation(self, record: ValidationRecord) -> None:
        # A validation comes after the training record of its step, so training records of that step stay.
        if self.validation and record.step <= self.validation[-1].step:
            self.validation = [each for each in self.validation if each.step < record.step]
        self.validation.append(record)

    def _drop_from(self, step: int) -> None:
        self.training = [each for each in self.training if each.step < step]
        self.validation = [each for each in self.validation if each.step < step]
        self.restarts = [each for each in self.restarts if each < step]

    @property
    def last_step(self) -> int:
        """The largest step of any record; 0 if there are no records."""
        return max([0, *(each.step for each in (*self.training[-1:], *self.validation[-1:]))])


@dataclass(frozen=True, kw_only=True)
class Run:
    """The content of a run folder."""

    path: Path
    records: Records
    config: dict[str, Any]  # content of config.yaml or config.json; empty if the file is missing or cannot be read
    summary: dict[str, Any]  # content of summary.json; empty if the file is missing or cannot be read
    seconds_since_record: float | None  # since metrics.jsonl was written; None if it is missing

    @property
    def status(self) -> str:
        return str(self.summary.get("status", "no summary yet"))

    @property
    def steps(self) -> int | None:
        """The number of steps that the run is to take; None if the config does not say."""
        return _integer(self.config.get("steps"))

    @property
    def ranks(self) -> int | None:
        return _integer(self.summary.get("world_size", self.config.get("processes")))


def find_run(path: str | Path) -> Path:
    """Return the run folder at a path, with links resolved: `runs/latest` is the newest run.

    Raises:
        RunFolderError: the path is no run folder. The message says what is missing, and names run folders in it or beside it.
    """
    given = Path(path)
    if _is_run(given):
        return given.resolve()
    if not given.exists():
        what = "there is no such folder"
    elif not given.is_dir():
        what = f"it is a file; give the folder that holds {METRICS}"
    else:
        what = f"it has neither {CONFIG} nor {METRICS}"
    inside = _runs_in(given)
    beside = inside or _runs_in(given.parent)
    if not beside:
        way_out = "no run folder is beside it; `make train` writes one below runs/"
    else:
        shown = ", ".join(printable(str(each)) for each in beside[:NAMED_FOLDERS])
        more = f" and {len(beside) - NAMED_FOLDERS} more" if len(beside) > NAMED_FOLDERS else ""
        way_out = f"run folders {'in' if inside else 'beside'} it, newest first: {shown}{more}"
    raise RunFolderError(f"{str(path)!r} is no run folder: {what}; {way_out}")


def read_run(path: Path) -> Run:
    """Read the whole content of a run folder that `find_run` has returned."""
    return Follower(path).read()


class Follower:
    """Reads a run folder repeatedly, and of metrics.jsonl only the appended lines.

    A job that resumes a run replaces metrics.jsonl by a shorter file, which is then read from its beginning.

    Args:
        path: a run folder, as `find_run` returns it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin()

    def _begin(self) -> None:
        self._records = Records()
        self._offset = 0  # offset of the first unread line
        self._before = b""  # the bytes before that offset, by which a replaced file is recognized

    def read(self) -> Run:
        """Return the current content of the run folder."""
        age = self._read_records()
        return Run(
            path=self._path,
            records=self._records,
            config=self._read_config(),
            summary=_parse_json(self._path / SUMMARY),
            seconds_since_record=age,
        )

    def _read_records(self) -> float | None:
        try:
            stream = (self._path / METRICS).open("rb")
        except FileNotFoundError:
            self._begin()
            return None
        with stream:
            # The bytes are compared, as a replaced file may have the same inode and a larger size.
            stream.seek(max(0, self._offset - COMPARED_BYTES))
            if stream.read(len(self._before)) != self._before:
                self._begin()
            stream.seek(self._offset)
            appended = stream.read()
            modified = os.fstat(stream.fileno()).st_mtime
        lines = appended.split(b"\n")
        # The file may end with half a record, which the next reading sees whole. A record without its newline is not added yet, even if it
        # is whole, so that no record is added twice.
        del lines[-1]
        for line in lines:
            self._records.add(line)
        length = sum(len(line) + 1 for line in lines)
        self._offset += length
        self._before = (self._before + appended[:length])[-COMPARED_BYTES:]
        return max(0.0, time.time() - modified)

    def _read_config(self) -> dict[str, Any]:
        path = self._path / CONFIG
        return _parse_yaml(path) if path.exists() else _parse_json(self._path / TRACKER_CONFIG)


def labels_of(paths: Sequence[Path]) -> list[str]:
    """Return short names of run folders: the last parts of each path, as many as distinguish them.

    >>> labels_of([Path("/a/x"), Path("/a/y")]), labels_of([Path("/a/x"), Path("/b/x")])
    (['x', 'y'], ['a/x', 'b/x'])
    """
    for count in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        labels = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def printable(text: str) -> str:
    r"""Replace characters that a page or a terminal must not show, as names and values in a run folder may be any string.

    >>> printable("a\x1b[31m\n\ud800")
    'a\ufffd[31m \ufffd'
    """
    return "".join(" " if each.isspace() else each if each.isprintable() else "\ufffd" for each in text)


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (CONFIG, METRICS))


def _runs_in(folder: Path) -> list[Path]:
    """Return the run folders in a folder, newest first, without links."""
    try:
        found = [each for each in folder.iterdir() if not each.is_symlink() and each.is_dir() and _is_run(each)]
        return sorted(found, key=lambda each: (each.stat().st_mtime, each), reverse=True)
    except OSError:
        return []


def _parse_yaml(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise MissingPackageError(f"reading {CONFIG} needs pyyaml, which is not installed; pip install pyyaml") from error
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _parse_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _training_record(content: dict[str, Any]) -> TrainingRecord | None:
    """Make a training record from the content of one step's lines; None if they have no values of training."""
    ranks = None
    if "train_loss_bits" in content:
        loss, optimizer, ranks = "train_loss_bits", content.get("optimizer"), content.get("non_finite_ranks")
    elif "val_bits_per_byte" in content:
        return None
    else:
        loss, optimizer = "loss", {key: value for key, value in content.items() if key not in ("step", "loss", "validation_loss")}
        if loss not in content and not optimizer:
            return None
    own = {key: _number(content[key]) for key in (loss, "lr", "tokens_per_second") if key in content}
    values = {key: _number(value) for key, value in optimizer.items()} if isinstance(optimizer, dict) else {}
    name, largest = _largest_rms(content, values)
    skipped = _number(content.get("skipped_steps"))
    return TrainingRecord(
        step=content["step"],
        loss=own.get(loss),
        lr=own.get("lr"),
        tokens_per_second=own.get("tokens_per_second"),
        largest_rms=largest,
        largest_rms_name=name,
        skipped_steps=int(skipped) if math.isfinite(skipped) and skipped >= 0 else None,
        optimizer=values,
        non_finite_ranks=_ranks_by_name(ranks),
    )


def _validation_record(content: dict[str, Any]) -> ValidationRecord | None:
    for key in ("val_bits_per_byte", "validation_loss"):
        if key in content:
            return ValidationRecord(step=content["step"], loss=_number(content[key]))
    return None


def _largest_rms(content: dict[str, Any], values: dict[str, float]) -> tuple[str | None, float | None]:
    """Return the name and the RMS of the tensor with the largest RMS, NaN counting as largest; (None, None) if there is no RMS."""
    if "train_loss_bits" in content:
        name = content.get("largest_rms_name")  # null without a name: the optimizer has no RMS
        return (name, _number(content["largest_rms"])) if "largest_rms" in content and isinstance(name, str) else (None, None)
    rms = {key.removeprefix("rms/"): value for key, value in values.items() if key.startswith("rms/")}
    name = max(rms, key=lambda key: math.inf if math.isnan(rms[key]) else rms[key], default=None)
    return name, None if name is None else rms[name]


def _ranks_by_name(value: Any) -> dict[str, list[int]]:
    """Return the entries of a JSON object whose values are lists of ranks; {} for any other JSON value."""
    rows = value.items() if isinstance(value, dict) else ()
    return {name: ranks for name, ranks in rows if isinstance(ranks, list) and all(map(_is_count, ranks))}


def _is_count(value: Any) -> bool:
    count = _integer(value)
    return count is not None and count >= 0


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> float:
    """Return a value as a float; NaN for null, and for anything else that is no number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.nan
