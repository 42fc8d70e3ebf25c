"""The folder of a run, in which rank 0 writes config.yaml, metrics.jsonl, loss.png and summary.json during the run."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

import sharded_optim as so
from launch.config import Config, ConfigError
from launch.keys import read
from launch.loss_curve import draw
from launch.records import Listener, Resumption, Summary, Training, Validation
from sharded_optim.trackers.atomic_write import write_text
from sharded_optim.trackers.run_files import METRICS, SUMMARY, append_record, keep_records, to_json

__all__ = ["RunFolder", "checkpoint_folder", "find", "find_run"]

# Largest fraction of the time that rank 0 may spend drawing, as the other ranks wait meanwhile.
SHARE_OF_DRAWING = 0.02


def find(config: Config) -> Path | None:
    """Find the folder of the run that a config continues; None if it begins a new run.

    Raises:
        ConfigError: the config begins a new run in a folder that exists.
    """
    runs = Path(config.runs_folder)
    if config.run is not None:
        path = runs / config.run
        if path.exists() and config.resume == "never":
            raise ConfigError(f"run={config.run!r}: {path} exists already; use resume=auto to resume it, or another name")
        return path if path.exists() else None
    if config.resume == "never":
        return None
    newest_first = sorted(runs.glob("*/config.yaml"), key=lambda path: (path.stat().st_mtime, path), reverse=True)
    return next((path.parent for path in newest_first if not path.parent.is_symlink() and _name_in(path) == config.name), None)


def find_run(config: Config, *, is_restart: bool) -> tuple[Path | None, str | None]:
    """Find the run that a job continues.

    Args:
        is_restart: whether a launcher has started this process again.

    Returns:
        The run's folder, or None for a new run; and a message if all steps of the run are done, as after a failure behind the last step,
        else None.

    Raises:
        ConfigError: see `find`.
    """
    run = find(config)
    if run is None:
        return None, None
    folder = checkpoint_folder(config, run)
    steps = so.checkpoint.steps(folder)
    # A run that the config does not name is continued only if it has a checkpoint, and steps left to do.
    if not steps:
        return (None if config.run is None else run), None
    if steps[-1] < config.steps or so.checkpoint.latest(folder) != steps[-1]:
        return run, None
    if config.run is None and not is_restart:
        return None, None
    return run, f"steps={config.steps} are done: {folder} has a checkpoint of step {steps[-1]}; raise steps to train for longer"


def checkpoint_folder(config: Config, run: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return run / "checkpoints" if config.checkpoint.folder is None else Path(config.checkpoint.folder) / run.name


class RunFolder(Listener):
    """A listener that writes all records to files in the run folder. The link `latest` beside that folder points to it.

    Args:
        config: the config of the job.
        existing: the folder of the run that is continued; None: a new folder is made.

    Raises:
        ConfigError: the folder cannot be made or written to.
    """

    def __init__(self, config: Config, existing: Path | None = None) -> None:
        self._training: list[Training] = []
        self._validation: list[Validation] = []
        self._summary: Summary | None = None
        self._draw_from = 0.0
        try:
            self.path = existing or _new_folder(Path(config.runs_folder), config)
            write_text(self.path / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
            _point_latest(self.path)
        except OSError as error:
            raise ConfigError(f"runs_folder={config.runs_folder!r}: {error}") from None

    def start(self, resumption: Resumption | None) -> None:
        """Read the records up to the step of the checkpoint, and remove the records of later steps, which are trained again."""
        records = list(map(_with_nan, keep_records(self.path / METRICS, 0 if resumption is None else resumption.step)))
        self._training = [Training(**record) for record in records if "train_loss_bits" in record]
        self._validation = [Validation(**record) for record in records if "val_bits_per_byte" in record]

    def training(self, record: Training) -> None:
        self._training.append(record)
        append_record(self.path / METRICS, asdict(record))

    def validation(self, record: Validation) -> None:
        self._validation.append(record)
        append_record(self.path / METRICS, asdict(record))

    def progress(self, summary: Summary) -> None:
        self._summary = summary
        write_text(self.path / SUMMARY, to_json(asdict(summary), indent=2) + "\n")
        began = time.monotonic()
        if began >= self._draw_from:
            draw(self.path / "loss.png", self._training, self._validation, summary)
            now = time.monotonic()
            self._draw_from = now + (now - began) / SHARE_OF_DRAWING

    def stop(self, step: int, why: str) -> None:
        if self._summary is not None:
            self.finish(replace(self._summary, status=f"interrupted after step {step}"))

    def finish(self, summary: Summary) -> None:
        self._draw_from = 0.0  # draw the last curve, however recent the one before
        self.progress(summary)


def _name_in(path: Path) -> str | None:
    """Read the job's name from the config.yaml of a run; None if it cannot be read."""
    with suppress(ConfigError):
        return read(path, yaml.safe_load, str(path)).get("name")
    return None


def _with_nan(record: Mapping[str, Any]) -> dict[str, Any]:
    """Replace null, which stands for non-finite values in JSON lines, by NaN. A null largest RMS stays: the record has no RMS."""
    nan = {key: math.nan for key, value in record.items() if value is None and not key.startswith("largest_rms")}
    return {**record, **nan, **{key: _with_nan(value) for key, value in record.items() if isinstance(value, dict)}}


def _new_folder(runs: Path, config: Config) -> Path:
    base = config.run or f"{datetime.now():%Y-%m-%d-%H%M%S}-{config.name}"
    for suffix in ("",) if config.run else ("", *(f"-{attempt}" for attempt in range(2, 1000))):
        with suppress(FileExistsError):  # another run, started in the same second
            path = runs / f"{base}{suffix}"
            path.mkdir(parents=True)
            return path
    raise FileExistsError(f"{runs / base} exists")


def _point_latest(path: Path) -> None:
    """Replace the link `latest` in one step, so that it always points to a run."""
    link = path.parent / f".latest-{path.name}"
    link.symlink_to(path.name)
    os.replace(link, path.parent / "latest")
