"""What a run leaves behind: a folder with config.yaml, metrics.jsonl, loss.png and summary.json. Rank 0 writes it while the run goes on."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from launch.config import Config, ConfigError
from launch.records import Resumption, Summary, Training, Validation
from sharded_optim.trackers.atomic_write import write_text
from sharded_optim.trackers.run_files import METRICS, SUMMARY, append_record, keep_records, to_json

__all__ = ["RunFolder", "find"]

# Other ranks wait while rank 0 draws, so it does only for so much of the time.
SHARE_OF_DRAWING = 0.02


def find(config: Config) -> Path | None:
    """The folder of the run that a config goes on with; None: it begins a new one.

    Raises:
        ConfigError: it is to begin one that is there already.
    """
    runs = Path(config.runs_folder)
    if config.run is not None:
        path = runs / config.run
        if not path.exists():
            return None
        if config.resume == "never":
            raise ConfigError(f"run={config.run!r}: {path} is there already; use resume=auto to go on with it, or another name")
        return path
    if config.resume == "never":
        return None
    written = [path for path in runs.glob("*/config.yaml") if not path.parent.is_symlink()]
    newest_first = sorted(written, key=lambda path: (path.stat().st_mtime, path), reverse=True)
    return next((path.parent for path in newest_first if _name_in(path) == config.name), None)


class RunFolder:
    """A listener that writes everything down. `latest` beside its folder points to it.

    Args:
        config: of the job.
        found: the folder to go on with; None: a new one.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, config: Config, found: Path | None = None) -> None:
        self._training: list[Training] = []
        self._validation: list[Validation] = []
        self._summary: Summary | None = None
        self._draw_from = 0.0
        try:
            self.path = found or _new_folder(Path(config.runs_folder), config)
            text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
            write_text(self.path / "config.yaml", text)
            _point_latest(self.path)
        except OSError as error:
            raise ConfigError(f"runs_folder={config.runs_folder!r}: {error}") from None

    def start(self, resumption: Resumption | None) -> None:
        """Take up what is written down of the steps before, and leave out what is going to be done once more."""
        kept = keep_records(self.path / METRICS, 0 if resumption is None else resumption.step)
        records = list(map(_with_nan, kept))
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
        self._write_summary(draw=time.monotonic() >= self._draw_from)

    def stop(self, step: int, why: str) -> None:
        if self._summary is not None:
            self._summary = replace(self._summary, status=f"interrupted after step {step}")
            self._write_summary(draw=True)

    def finish(self, summary: Summary) -> None:
        self._summary = summary
        self._write_summary(draw=True)

    def _write_summary(self, *, draw: bool) -> None:
        assert self._summary is not None, "there is something to write"
        write_text(self.path / SUMMARY, to_json(asdict(self._summary), indent=2) + "\n")
        if draw:
            from launch.loss_curve import draw as draw_curve  # imports matplotlib, for which the first step need not wait

            began = time.monotonic()
            draw_curve(self.path / "loss.png", self._training, self._validation, self._summary)
            now = time.monotonic()
            self._draw_from = now + (now - began) / SHARE_OF_DRAWING


def _name_in(path: Path) -> str | None:
    """Of a config that a run has written down."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content.get("name") if isinstance(content, dict) else None


def _with_nan(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of JSON with NaN again where null stands for what was not finite. Without a largest RMS, null says that there is none."""
    nan = {key: math.nan for key, value in record.items() if value is None and not key.startswith("largest_rms")}
    return {**record, **nan, **{key: _with_nan(value) for key, value in record.items() if isinstance(value, dict)}}


def _new_folder(runs: Path, config: Config) -> Path:
    if config.run is not None:
        (runs / config.run).mkdir(parents=True)
        return runs / config.run
    base = f"{datetime.now():%Y-%m-%d-%H%M%S}-{config.name}"
    for attempt in range(1, 1000):
        path = runs / (base if attempt == 1 else f"{base}-{attempt}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:  # another run, started in the same second
            continue
        return path
    raise FileExistsError(f"{runs / base} and its successors exist")


def _point_latest(path: Path) -> None:
    """In one step, so that `latest` always points to a run."""
    link = path.parent / f".latest-{path.name}"
    link.symlink_to(path.name)
    os.replace(link, path.parent / "latest")
