"""Trackers send an optimizer's metrics elsewhere: TensorBoard, W&B, MLflow, Prometheus, JSON lines. One file per destination.

Each of them is listed in `registry.py`, and imports its client when it is opened. Used as `so.trackers.open(...)`, and by the training job.
"""

from __future__ import annotations

from sharded_optim.trackers.destination import Destination, Run, Status, Tracker
from sharded_optim.trackers.registry import MODULES, check_installed, check_options
from sharded_optim.trackers.several import Trackers
from sharded_optim.trackers.several import open_trackers as open  # noqa: A004

__all__ = ["MODULES", "Destination", "Run", "Status", "Tracker", "Trackers", "check_installed", "check_options", "open"]
