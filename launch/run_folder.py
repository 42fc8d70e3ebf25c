"""What a run leaves behind: runs/<time>-<name>/ with config.yaml, metrics.jsonl, loss.png and summary.json. Rank 0 writes it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from launch.config import Config, ConfigError
from launch.records import Resumption, Summary, Training, Validation

__all__ = ["RunFolder"]


class RunFolder:
    """A listener that writes everything down. `path` is new, and `latest` beside it points to it.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, config: Config) -> None:
        self._training: list[Training] = []
        self._validation: list[Validation] = []
        try:
            self.path = _new_folder(Path(config.runs_folder), config.name)
            text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
            (self.path / "config.yaml").write_text(text, encoding="utf-8")
            _point_latest(self.path)
        except OSError as error:
            raise ConfigError(f"runs_folder={config.runs_folder!r}: {error}") from None

    def start(self, resumption: Resumption | None) -> None:
        """Nothing to write down: the first record has its step."""

    def training(self, record: Training) -> None:
        self._training.append(record)
        self._append(asdict(record))

    def validation(self, record: Validation) -> None:
        self._validation.append(record)
        self._append(asdict(record))

    def stop(self, step: int, why: str) -> None:
        """What is written down so far stays; there is no summary."""

    def finish(self, summary: Summary) -> None:
        from launch.loss_curve import draw  # imports matplotlib, for which a job that is started again need not wait

        draw(self.path / "loss.png", self._training, self._validation, summary)
        (self.path / "summary.json").write_text(_to_json(asdict(summary), indent=2) + "\n", encoding="utf-8")

    def _append(self, record: dict[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as stream:  # complete lines on disk, whatever happens next
            stream.write(_to_json(record) + "\n")


def _to_json(record: dict[str, Any], indent: int | None = None) -> str:
    """JSON has no NaN: what is not finite is null."""
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
    return json.dumps(finite, allow_nan=False, indent=indent)


def _new_folder(runs: Path, name: str) -> Path:
    base = f"{datetime.now():%Y-%m-%d-%H%M%S}-{name}"
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
