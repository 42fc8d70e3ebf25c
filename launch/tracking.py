"""The job's trackers: a listener of rank 0 that hands records to `so.trackers`, and the check that their packages are installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sharded_optim as so
from launch.config import Config
from launch.errors import ConfigError
from launch.records import Listener, Resumption, Summary, Training, Validation

__all__ = ["Tracking", "check_installed"]

SECONDS_HEALTHY = 3.0  # ranks send a heartbeat once a second; three missed ones are more than a busy machine explains


def check_installed(config: Config) -> None:
    """Check that the packages of the config's trackers are installed. Only rank 0 needs them.

    Raises:
        ConfigError: a package is not installed.
    """
    try:
        so.trackers.check_installed(config.trackers)
    except ImportError as error:
        raise ConfigError(f"trackers={config.trackers!r}: {error}, or leave it out") from None


class Tracking(Listener):
    """A listener that logs each record to the trackers that the config names.

    Args:
        config: the config of the job.
        path: the run's folder.
        seconds_since_heartbeat: returns the seconds since the last heartbeat of each rank.
    """

    def __init__(self, config: Config, path: Path, seconds_since_heartbeat: Callable[[], Mapping[int, float]]) -> None:
        self._config, self._path = config, path
        self._seconds_since_heartbeat = seconds_since_heartbeat
        self._trackers = so.trackers.Trackers({})  # none before `start`

    def start(self, resumption: Resumption | None) -> None:
        options: dict[str, Mapping[str, Any]] = dict(self._config.tracker_options)
        if "prometheus" in self._config.trackers:
            options["prometheus"] = {**options.get("prometheus", {}), "live": self._health}
        self._trackers = so.trackers.open(
            self._config.trackers,
            self._path.parent,
            run=self._path.name,
            config=self._config.model_dump(mode="json"),
            resume_after=None if resumption is None else resumption.step,
            options=options,
        )

    def training(self, record: Training) -> None:
        # Without the record's own lr: the optimizer's `lr/0` and so on say more, and MLflow's files cannot hold `lr` beside them.
        values = {"loss": record.train_loss_bits, "tokens_per_second": record.tokens_per_second, **record.optimizer}
        self._trackers.log(record.step, values)

    def validation(self, record: Validation) -> None:
        self._trackers.log(record.step, {"validation_loss": record.val_bits_per_byte})

    def stop(self, step: int, why: str) -> None:
        self._trackers.finish("interrupted")

    def finish(self, summary: Summary) -> None:
        self._trackers.finish("finished")

    def fail(self) -> None:
        """Have trackers write their remaining records, for 10 s at most, and report that the run has failed. The last call."""
        self._trackers.finish("failed")

    def _health(self) -> dict[str, float]:
        """Return the metrics that Prometheus can read at any time, also while a step hangs."""
        ages = self._seconds_since_heartbeat()
        healthy = sum(seconds < SECONDS_HEALTHY for seconds in ages.values())
        return {"healthy_ranks": float(healthy)} | {f"heartbeat_age_seconds/{rank}": seconds for rank, seconds in ages.items()}
