"""Types of trackers: a run, the interface of a tracker, and the entry of a destination in the registry.

Used by every file of this folder. Trackers import their client when they are opened, so that importing the library does not.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from sharded_optim.trackers.atomic_write import write_text

__all__ = ["Destination", "Run", "Status", "Tracker", "kind_of"]

_ids_lock = threading.Lock()
Status = Literal["finished", "interrupted", "failed"]  # interrupted: stopped before its last step, and may be resumed


class Tracker(Protocol):
    """Write the metrics of one run to one destination. All calls come from one thread."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record values of a step. Several calls may record different keys of one step."""

    def finish(self, status: Status) -> None:
        """Write the remaining records, and release all resources. Nothing is logged afterwards."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run, as it is described to trackers.

    Attributes:
        folder: the folder of all runs.
        name: the name of this run, and of its folder in `folder`.
        config: the configuration of the run; values that JSON can write.
        resume_after: the step after which training resumes, so that a tracker must not record steps twice; None for a new run.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    resume_after: int | None = None

    @property
    def path(self) -> Path:
        """The folder of this run, created if it is missing."""
        path = self.folder / self.name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def load_id(self, tracker: str) -> str | None:
        """Return the client's id of a resumed run; None for a new run, or if no id was saved."""
        return self._ids().get(tracker) if self.resume_after is not None else None

    def save_id(self, tracker: str, client_id: str) -> None:
        """Save the client's id of this run, for `load_id` after a restart."""
        with _ids_lock:  # trackers may run on threads of their own
            write_text(self.path / "tracker_ids.json", json.dumps(self._ids() | {tracker: client_id}) + "\n")

    def _ids(self) -> dict[str, str]:
        path = self.path / "tracker_ids.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


@dataclass(frozen=True, kw_only=True)
class Destination:
    """A destination, and how its tracker is opened. Each module in the registry defines one, named DESTINATION.

    Attributes:
        opens: (run, **options) -> the tracker. Its keyword-only parameters are the options that users may give.
        client: the module that the tracker imports; None if it needs Python alone.
        install: the argument of `pip install` that provides the client.
        may_block: whether the tracker waits for other machines. It then runs on a thread of its own, so that training does not wait.
    """

    opens: Callable[..., Tracker]
    client: str | None = None
    install: str = ""
    may_block: bool = False

    @property
    def is_installed(self) -> bool:
        """Whether the client can be imported. Imports nothing."""
        if self.client is None:
            return True
        spec = find_spec(self.client)
        # A folder of that name in the current folder, such as the `wandb` that W&B makes there, is a namespace package without a file.
        return spec is not None and spec.origin is not None


def kind_of(values: Mapping[str, float]) -> str:
    """Return the kind of a record, such as training or validation: its first key, as other keys may differ between steps."""
    return next(iter(values), "")
