"""Checkpoints of the job: when they are saved, their content besides model and optimizer, and resuming from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.optim.lr_scheduler import LRScheduler

import sharded_optim as so
from launch.config import Config
from launch.records import Resumption
from launch.run_folder import checkpoint_folder
from launch.sharding import Sharded

__all__ = ["Checkpoints"]


class Checkpoints:
    """Save a job in the background at the steps that its config asks for, and resume it. Every rank calls every method.

    Args:
        config: the config of the job.
        run: the run's folder.
        sharded: the job's model and optimizer.
        schedule: the schedule of the learning rate.
    """

    def __init__(self, config: Config, run: Path, sharded: Sharded, schedule: LRScheduler) -> None:
        self._config = config
        self._root = checkpoint_folder(config, run)
        self._live = {"model": sharded.model, "optimizer": sharded.optimizer}
        self._schedule = schedule
        self._world_size = dist.get_world_size()
        self._saving: so.checkpoint.Saving | None = None
        self._saved: int | None = None  # step of the last save; the same on all ranks, which may see different folders

    def resume(self) -> Resumption | None:
        """Load the newest checkpoint that verifies, if the config asks for that.

        Returns:
            The checkpoint that was loaded; None if there is none, or resume is "never": training begins.

        Raises:
            CheckpointError: there are checkpoints, but none is intact, or the newest intact one does not fit the job.
        """
        if self._config.resume == "never":
            return None
        try:
            extra: dict[str, Any] = so.checkpoint.load(self._root, **self._live)
        except so.checkpoint.NoCheckpointError:
            return None
        self._schedule.load_state_dict(extra["schedule"])
        self._saved = extra["step"]
        return Resumption(step=extra["step"], saved_by=extra.get("world_size", self._world_size), world_size=self._world_size)

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after a step: at intervals of `every` steps, and after the last."""
        every = self._config.checkpoint.every
        return every is not None and (step % every == 0 or step == self._config.steps)

    def after(self, step: int) -> None:
        """Save in the background, if a checkpoint is due after this step."""
        if self.is_due(step):
            self._saved = step
            self._saving = so.checkpoint.async_save(self._root, step, **self._arguments(step))

    def save_now(self, step: int) -> Path:
        """Save a job that stops after a step, unless that step is saved; also if the config has no checkpoints. Call `finish` first.

        Returns:
            The folder of checkpoints.
        """
        if self._saved != step:
            so.checkpoint.save(self._root, step, **self._arguments(step))
        return self._root

    def _arguments(self, step: int) -> dict[str, Any]:
        extra = {"step": step, "schedule": self._schedule.state_dict(), "world_size": self._world_size}
        return {**self._live, "extra": extra, "keep": self._config.checkpoint.keep}

    def finish(self) -> None:
        """Wait until the last save is committed."""
        if self._saving is not None:
            self._saving.wait()
