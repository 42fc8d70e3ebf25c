"""The job's checkpoints: when they are saved, what is in them beside model and optimizer, and how a job goes on from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.optim.lr_scheduler import LRScheduler

import sharded_optim as so
from launch.config import Config, ConfigError
from launch.records import Resumption
from launch.sharding import Sharded

__all__ = ["Checkpoints", "check_folder", "is_done"]


class Checkpoints:
    """Saves a job every so many steps, in the background, and takes it up again. What every rank does.

    Args:
        config: of the job.
        sharded: its model and optimizer.
        schedule: of the optimizer's learning rate.
    """

    def __init__(self, config: Config, sharded: Sharded, schedule: LRScheduler) -> None:
        self._config = config.checkpoint
        self._steps = config.steps
        self._resumes = config.resume == "auto"
        self._root = folder_of(config)
        self._sharded = sharded
        self._schedule = schedule
        self._world_size = dist.get_world_size()
        self._saving: so.checkpoint.Saving | None = None
        self._saved: int | None = None  # the step of the last save; the same on all ranks, which folders need not be

    def resume(self) -> Resumption | None:
        """Go on from the newest checkpoint that verifies, if the config says so.

        Returns:
            What was found; None where training begins.

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
        """Whether it is time to save: also after the last step."""
        every = self._config.every
        return every is not None and (step % every == 0 or step == self._steps)

    def after(self, step: int) -> None:
        """Save in the background, if it is time."""
        if self.is_due(step):
            self._saved = step
            self._saving = so.checkpoint.async_save(self._root, step, **self._content(step), keep=self._config.keep)

    def before_stopping(self, step: int) -> Path:
        """Save what a job has reached that is stopped after a step, unless it has been saved; also where the job saves nothing else.

        Returns:
            The folder of checkpoints: where another job has left some, one beside it.
        """
        self.finish()
        if self._saved is None:
            told = [_unused(self._root)]  # of rank 0, as folders need not look the same to all
            dist.broadcast_object_list(told)
            (self._root,) = told
        if self._saved != step:
            so.checkpoint.save(self._root, step, **self._content(step), keep=self._config.keep)
        return self._root

    def _content(self, step: int) -> dict[str, Any]:
        extra = {"step": step, "schedule": self._schedule.state_dict(), "world_size": self._world_size}
        return {"model": self._sharded.model, "optimizer": self._sharded.optimizer, "extra": extra}

    def finish(self) -> None:
        """Return when all that was saved is committed."""
        if self._saving is not None:
            self._saving.wait()


def check_folder(config: Config) -> None:
    """Refuse a folder of checkpoints that does not go with the config, before the ranks depend on each other.

    Raises:
        ConfigError: says which key to change.
    """
    found = so.checkpoint.steps(folder_of(config))
    where = f"{folder_of(config)} has checkpoints of steps {', '.join(map(str, found))}"
    if config.resume == "never" and config.checkpoint.every is not None and found:
        raise ConfigError(f"{where}; use resume=auto to go on from the last, or another checkpoint.folder")


def is_done(config: Config) -> str | None:
    """Whether nothing is left to do for a job that goes on: as when it failed after its last step, and was started again.

    Returns:
        A sentence that says so, or None.
    """
    folder = folder_of(config)
    found = so.checkpoint.steps(folder)
    if config.resume == "auto" and found and found[-1] >= config.steps and so.checkpoint.latest(folder) == found[-1]:
        return f"steps={config.steps} are done: {folder} has a checkpoint of step {found[-1]}; raise steps to train for longer"
    return None


def folder_of(config: Config) -> Path:
    """Where a job's checkpoints are: the same folder each time, so that the next job finds them."""
    return Path(config.checkpoint.folder or Path(config.runs_folder) / f"{config.name}-checkpoints")


def _unused(folder: Path) -> Path:
    """The folder if it has no checkpoints, else the first like it that has none."""
    number, found = 1, folder
    while so.checkpoint.steps(found):
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found
