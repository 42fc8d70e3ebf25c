"""The job's checkpoints: when they are saved, what is in them beside model and optimizer, and how a job goes on from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

import sharded_optim as so
from launch.config import Config, ConfigError
from launch.sharding import Sharded

__all__ = ["Checkpoints", "check_folder"]


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
        self._saving: so.checkpoint.Saving | None = None

    def resume(self) -> int:
        """Go on from the newest checkpoint that verifies, if the config says so.

        Returns:
            Its step; 0 where training begins.

        Raises:
            CheckpointError: there are checkpoints, and none is whole or fits the job.
        """
        if not self._resumes:
            return 0
        try:
            extra: dict[str, Any] = so.checkpoint.load(self._root, model=self._sharded.model, optimizer=self._sharded.optimizer)
        except so.checkpoint.NoCheckpointError:
            return 0
        self._schedule.load_state_dict(extra["schedule"])
        return extra["step"]

    def after(self, step: int) -> None:
        """Save, if it is time: also after the last step."""
        every = self._config.every
        if every is not None and (step % every == 0 or step == self._steps):
            self._saving = so.checkpoint.async_save(
                self._root,
                step,
                model=self._sharded.model,
                optimizer=self._sharded.optimizer,
                extra={"step": step, "schedule": self._schedule.state_dict()},
                keep=self._config.keep,
            )

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
    if config.resume == "auto" and found and found[-1] >= config.steps and so.checkpoint.latest(folder_of(config)) == found[-1]:
        raise ConfigError(f"{where}, and steps={config.steps} are done; raise steps, or use another checkpoint.folder")


def folder_of(config: Config) -> Path:
    """Where a job's checkpoints are: the same folder each time, so that the next job finds them."""
    return Path(config.checkpoint.folder or Path(config.runs_folder) / f"{config.name}-checkpoints")
