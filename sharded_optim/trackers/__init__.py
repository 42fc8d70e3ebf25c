"""Send metrics to TensorBoard, W&B, MLflow, Prometheus or JSON lines. Each destination has a file.

Destinations are listed in `registry.py`. A tracker imports its client package when it is opened. Used as `so.trackers.open(...)`, and by
the training job.
"""

from __future__ import annotations

from sharded_optim.trackers.destination import Destination, Run, Status, Tracker
from sharded_optim.trackers.registry import MODULES, check_installed, check_options
from sharded_optim.trackers.several import Trackers
from sharded_optim.trackers.several import open_trackers as open  # noqa: A004

__all__ = ["MODULES", "Destination", "Run", "Status", "Tracker", "Trackers", "check_installed", "check_options", "open"]
