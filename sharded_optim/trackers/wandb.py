"""Weights & Biases: a run of a project, or offline in `<folder>/<run>/wandb`.

Needs the package wandb. Tried offline with versions 0.20 and 0.31.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Literal

from sharded_optim.trackers.destination import Destination, Run, Status

__all__ = ["DESTINATION"]


class WeightsAndBiases:
    """Log each record with its step. A resumed run continues under its saved id; W&B ignores steps that it already has.

    Args:
        run: the run to track.
        project: the name of the project; None: W&B's own setting, such as WANDB_PROJECT.
        mode: "offline" writes files that `wandb sync` uploads later; None: W&B's own setting, such as WANDB_MODE.
    """

    def __init__(self, run: Run, *, project: str | None = None, mode: Literal["online", "offline", "disabled"] | None = None) -> None:
        wandb: Any = import_module("wandb")
        known_id = run.load_id("wandb")
        self._run = wandb.init(
            dir=str(run.path),
            name=run.name,
            id=known_id,
            resume="allow" if known_id is not None and mode != "offline" else None,
            project=project,
            mode=mode,
            config=dict(run.config),
            reinit="create_new",  # beside a run that the user's own code has open
            settings=wandb.Settings(console="off"),  # else it captures all that this process prints
        )
        run.save_id("wandb", self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)  # values of one step that are logged in several calls become one record

    def finish(self, status: Status) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)


DESTINATION = Destination(opens=WeightsAndBiases, client="wandb", install="wandb", may_block=True)
