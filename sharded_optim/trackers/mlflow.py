"""MLflow: a run on a tracking server, or in the SQLite database `<folder>/mlflow.db`. Needs the package mlflow, or mlflow-skinny.

The SQLite database also needs sqlalchemy and alembic, which mlflow brings and mlflow-skinny does not. Tried with versions 3.0 and 3.17.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from sharded_optim.trackers.destination import Destination, Run, Status, kind_of
from sharded_optim.trackers.dotted_keys import dotted_keys

__all__ = ["DESTINATION", "metric_name"]

STATUSES: Mapping[Status, str] = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
# MLflow's limits of one request, and of the length of names and values.
METRICS_PER_BATCH, PARAMS_PER_BATCH = 1000, 100
LONGEST_NAME, LONGEST_VALUE = 250, 6000


class MLflow:
    """Log metrics, and the config as parameters, by MLflow's client, so that the user's active run, a global of MLflow, is left alone.

    Args:
        run: the run to track.
        uri: the tracking server or database; None: MLflow's own setting, such as MLFLOW_TRACKING_URI, and without one
            `<folder>/mlflow.db`.
        experiment: the name of the experiment, which is created if it is missing.
    """

    def __init__(self, run: Run, *, uri: str | None = None, experiment: str = "sharded_optim") -> None:
        mlflow: Any = import_module("mlflow")
        self._entities: Any = import_module("mlflow.entities")
        if uri is None:
            is_set = mlflow.is_tracking_uri_set()
            uri = mlflow.get_tracking_uri() if is_set else f"sqlite:///{run.folder.resolve() / 'mlflow.db'}"
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        self._last_steps: dict[str, int] = {}  # last steps in MLflow by kind of record, for a resumed run
        known_id = run.load_id("mlflow")
        self._is_resumed = known_id is not None
        if known_id is not None:
            self._id = known_id
            self._client.update_run(self._id, "RUNNING")
            return
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = self._client.create_experiment(experiment) if found is None else found.experiment_id
        self._id = self._client.create_run(experiment_id, run_name=run.name).info.run_id
        run.save_id("mlflow", self._id)
        params = [self._entities.Param(metric_name(key), str(value)[:LONGEST_VALUE]) for key, value in dotted_keys(run.config).items()]
        for batch in _batches(params, PARAMS_PER_BATCH):
            self._client.log_batch(self._id, params=batch)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._is_resumed and step <= self._last_step(kind_of(values)):  # MLflow would keep both values of a step that is logged twice
            return
        milliseconds = int(time.time() * 1000)
        metrics = [self._entities.Metric(metric_name(key), value, milliseconds, step) for key, value in values.items()]
        for batch in _batches(metrics, METRICS_PER_BATCH):
            self._client.log_batch(self._id, metrics=batch)

    def finish(self, status: Status) -> None:
        self._client.set_terminated(self._id, STATUSES[status])

    def _last_step(self, kind: str) -> int:
        """Return the last step in MLflow for a kind of record, -1 if there is none. One request for each kind, not for each metric."""
        if kind not in self._last_steps:
            history = self._client.get_metric_history(self._id, metric_name(kind))
            self._last_steps[kind] = max((metric.step for metric in history), default=-1)
        return self._last_steps[kind]


def metric_name(key: str) -> str:
    """Convert a key to a name that MLflow allows: other characters become `_`, and empty, `.` and `..` parts of the path are removed.

    >>> metric_name("rms/blocks[0].weight"), metric_name("/a/../b")
    ('rms/blocks_0_.weight', 'a/b')
    """
    parts = [part for part in re.sub(r"[^\w\-. /]", "_", key).split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:LONGEST_NAME]


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


DESTINATION = Destination(opens=MLflow, client="mlflow", install="mlflow", may_block=True)
