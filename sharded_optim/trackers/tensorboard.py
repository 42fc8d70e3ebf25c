"""TensorBoard: event files in `<folder>/<run>/tensorboard`, which `tensorboard --logdir <folder>` shows. Needs the package tensorboard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from sharded_optim.trackers.destination import Destination, Run, Status

__all__ = ["DESTINATION"]


class TensorBoard:
    """Write a scalar for each value, which TensorBoard groups by the part of the key before the first `/`, and the config as a text."""

    def __init__(self, run: Run) -> None:
        first_step = 0 if run.resume_after is None else run.resume_after + 1
        module: Any = import_module("torch.utils.tensorboard")
        # With purge_step, TensorBoard hides the values of this step and later ones in other event files of the folder.
        self._writer = module.SummaryWriter(log_dir=str(run.path / "tensorboard"), purge_step=first_step)
        text = json.dumps(run.config, indent=4, default=str)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), first_step)  # Markdown's code block

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()  # without it, a killed process loses up to two minutes of records

    def finish(self, status: Status) -> None:
        self._writer.close()


DESTINATION = Destination(opens=TensorBoard, client="tensorboard", install="tensorboard")
