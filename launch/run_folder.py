"""What a run leaves behind: a folder with config.yaml, metrics.jsonl, loss.png and summary.json. Rank 0 writes it while the run goes on."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from launch.config import Config, ConfigError
from launch.records import Resumption, Summary, Training, Validation

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
            _write(self.path / "config.yaml", text)
            _point_latest(self.path)
        except OSError as error:
            raise ConfigError(f"runs_folder={config.runs_folder!r}: {error}") from None

    def start(self, resumption: Resumption | None) -> None:
        """Take up what is written down of the steps before, and leave out what is going to be done once more."""
        path = self.path / "metrics.jsonl"
        before = 0 if resumption is None else resumption.step
        records = [record for record in map(_from_json, path.read_text(encoding="utf-8").splitlines()) if record] if path.exists() else []
        records = [record for record in records if record["step"] <= before]
        self._training = [Training(**record) for record in records if "train_loss_bits" in record]
        self._validation = [Validation(**record) for record in records if "val_bits_per_byte" in record]
        if path.exists():
            _write(path, "".join(_to_json(record) + "\n" for record in records))

    def training(self, record: Training) -> None:
        self._training.append(record)
        self._append(asdict(record))

    def validation(self, record: Validation) -> None:
        self._validation.append(record)
        self._append(asdict(record))

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
        _write(self.path / "summary.json", _to_json(asdict(self._summary), indent=2) + "\n")
        if draw:
            from launch.loss_curve import draw as draw_curve  # imports matplotlib, for which the first step need not wait

            began = time.monotonic()
            draw_curve(self.path / "loss.png", self._training, self._validation, self._summary)
            now = time.monotonic()
            self._draw_from = now + (now - began) / SHARE_OF_DRAWING

    def _append(self, record: dict[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as stream:  # complete lines on disk, whatever happens next
            stream.write(_to_json(record) + "\n")


def _write(path: Path, text: str) -> None:
    """In one step, so that there is always a whole file."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _name_in(path: Path) -> str | None:
    """Of a config that a run has written down."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content.get("name") if isinstance(content, dict) else None


def _from_json(line: str) -> dict[str, Any] | None:
    """A record; None for a line that a killed process has left half written. Null is what was not finite."""
    try:
        record: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return {key: math.nan if value is None and not key.startswith("largest_rms") else value for key, value in record.items()}


def _to_json(record: dict[str, Any], indent: int | None = None) -> str:
    """JSON has no NaN: what is not finite is null."""
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
    return json.dumps(finite, allow_nan=False, indent=indent)


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
