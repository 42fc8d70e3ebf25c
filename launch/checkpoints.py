"""The job's checkpoints: when they are saved, what is in them beside model and optimizer, and how a job goes on from one."""

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

__all__ = ["Checkpoints", "go_on"]


class Checkpoints:
    """Saves a job every so many steps, in the background, and takes it up again. What every rank does.

    Args:
        config: of the job.
        run: the run's folder.
        sharded: its model and optimizer.
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
        """Return when all that was saved is committed."""
        if self._saving is not None:
            self._saving.wait()


def go_on(config: Config, *, is_restart: bool) -> tuple[Path | None, str | None]:
    """Which run to go on with.

    Args:
        is_restart: whether a launcher has started this process again.

    Returns:
        The run's folder, or None for a new one; and a sentence if nothing is left to do in it, as when it failed after its last step.

    Raises:
        ConfigError: see `run_folder.find`.
    """
    run = run_folder.find(config)
    if run is None:
        return None, None
    folder = _folder_of(config, run)
    found = so.checkpoint.steps(folder)
    is_done = bool(found) and found[-1] >= config.steps and so.checkpoint.latest(folder) == found[-1]
    if config.run is None and (
        not found or (is_done and not is_restart)
    ):  # nobody has asked for this one, and there is nothing to go on from
        return None, None
    told = (
        f"steps={config.steps} are done: {folder} has a checkpoint of step {found[-1]}; raise steps to train for longer"
        if is_done
        else None
    )
    return run, told


def _folder_of(config: Config, run: Path) -> Path:
    return run / "checkpoints" if config.checkpoint.folder is None else Path(config.checkpoint.folder) / run.name
