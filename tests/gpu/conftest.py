"""Skips the tests of this folder without a GPU, for one reason, and writes down what became of each for `python -m tests.gpu`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from gpu.device import REHEARSAL

HERE = Path(__file__).parent
RECORD = "GPU_CHECK_RECORD"  # a file, which then has a line for each test, also if the process is ended
NO_GPU = "needs a GPU: make gpu-check (python -m tests.gpu --rehearse does without)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    is_there = REHEARSAL or torch.cuda.is_available()
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.filterwarnings("ignore:weight_decay"))
            if not is_there:
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = os.environ.get(RECORD)
    if path is None or "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    told = {"test": report.nodeid.partition("::")[2], "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.skipped and isinstance(report.longrepr, tuple):
        told["reason"] = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        told["reason"] = report.longreprtext
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(told) + "\n")


@pytest.fixture(autouse=True)
def quiet_interpreter() -> Iterator[None]:
    """NumPy, by which Triton's interpreter computes, warns of what IEEE 754 defines."""
    with np.errstate(all="ignore"):
        yield
