"""Checkpoints of the job: when they are saved, their content beside model and optimizer, and resuming from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.optim.lr_scheduler import LRScheduler

import sharded_optim as so
from launch import run_folder
from launch.config import Config
from launch.records import Resumption
from launch.sharding import Sharded

__all__ = ["Checkpoints", "find_run"]


class Checkpoints:
    """Save a job every so many steps, in the background, and resume it. Every rank calls every method.

    Args:
        config: of the job.
        run: the run's folder.
        sharded: the job's model and optimizer.
        schedule: of the optimizer's learning rate.
    """

    def __init__(self, config: Config, run: Path, sharded: Sharded, schedule: LRScheduler) -> None:
        self._config = config.checkpoint
        self._steps = config.steps
        self._resumes = config.resume == "auto"
        self._root = _folder_of(config, run)
        self._sharded = sharded
        self._schedule = schedule
        self._world_size = dist.get_world_size()
        self._saving: so.checkpoint.Saving | None = None
        self._saved: int | None = None  # the step of the last save; the same on all ranks, which folders need not be

    def resume(self) -> Resumption | None:
        """Load the newest checkpoint that verifies, if the config asks for that.

        Returns:
            The checkpoint that was loaded; None if there is none, and training begins.

        Raises:
            CheckpointError: there are checkpoints, and none is whole or fits the job.
        """
        if not self._resumes:
            return None
        try:
            extra: dict[str, Any] = so.checkpoint.load(self._root, model=self._sharded.model, optimizer=self._sharded.optimizer)
        except so.checkpoint.NoCheckpointError:
            return None
        self._schedule.load_state_dict(extra["schedule"])
        self._saved = extra["step"]
        return Resumption(step=extra["step"], saved_by=extra.get("world_size", self._world_size), world_size=self._world_size)

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after a step: every so many steps, and after the last."""
        every = self._config.every
        return every is not None and (step % every == 0 or step == self._steps)

    def after(self, step: int) -> None:
        """Save in the background, if a checkpoint is due after this step."""
        if self.is_due(step):
            self._saved = step
            self._saving = so.checkpoint.async_save(self._root, step, **self._content(step), keep=self._config.keep)

    def before_stopping(self, step: int) -> Path:
        """Save a job that is stopped after a step, unless that step is saved; also if the config asks for no checkpoints.

        Returns:
            The folder of checkpoints.
        """
        self.finish()
        if self._saved != step:
            so.checkpoint.save(self._root, step, **self._content(step), keep=self._config.keep)
        return self._root

    def _content(self, step: int) -> dict[str, Any]:
        extra = {"step": step, "schedule": self._schedule.state_dict(), "world_size": self._world_size}
        return {"model": self._sharded.model, "optimizer": self._sharded.optimizer, "extra": extra}

    def finish(self) -> None:
        """Wait until the last save is committed."""
        if self._saving is not None:
            self._saving.wait()


def find_run(config: Config, *, is_restart: bool) -> tuple[Path | None, str | None]:
    """Find the run that a job continues.

    Args:
        is_restart: whether a launcher has started this process again.

    Returns:
        The run's folder, or None for a new run; and a message if all its steps are done, as when it failed after its last step, else None.

    Raises:
        ConfigError: see `run_folder.find`.
    """
    run = run_folder.find(config)
    if run is None:
        return None, None
    folder = _folder_of(config, run)
    steps = so.checkpoint.steps(folder)
    is_done = bool(steps) and steps[-1] >= config.steps and so.checkpoint.latest(folder) == steps[-1]
    # A run that the config does not name is continued only if it has something to continue from, and something to do.
    if config.run is None and (not steps or (is_done and not is_restart)):
        return None, None
    done = f"steps={config.steps} are done: {folder} has a checkpoint of step {steps[-1]}; raise steps to train for longer"
    return run, done if is_done else None


def _folder_of(config: Config, run: Path) -> Path:
    return run / "checkpoints" if config.checkpoint.folder is None else Path(config.checkpoint.folder) / run.name
