"""Skips the tests of this folder without a GPU, in one line, and writes down what became of each for `python -m tests.gpu`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from gpu.device import REHEARSAL

HERE = Path(__file__).parent
RECORD = "GPU_CHECK_RECORD"  # a file, which then has a line for each test, also if the process is ended
NO_GPU = "make gpu-check (python -m tests.gpu --rehearse does without)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU the first test stands for all: it is skipped, the others are deselected."""
    of_gpu = [item for item in items if item.path.is_relative_to(HERE)]
    for item in of_gpu:
        item.add_marker(pytest.mark.filterwarnings("ignore:weight_decay"))
    if REHEARSAL or torch.cuda.is_available() or not of_gpu:
        return
    first, *others = of_gpu
    first.add_marker(pytest.mark.skip(reason=f"{len(of_gpu)} tests need a GPU: {NO_GPU}"))
    items[:] = [item for item in items if item not in set(others)]
    config.hook.pytest_deselected(items=others)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.passed:
        return
    told = {"test": report.nodeid.partition("::")[2], "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.skipped and isinstance(report.longrepr, tuple):
        told["reason"] = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        told["reason"] = report.longreprtext
    _write(told)


def pytest_sessionfinish() -> None:
    """Not there where the process was ended, as by a time limit of a test."""
    _write({"outcome": "end"})


def _write(told: dict[str, object]) -> None:
    path = os.environ.get(RECORD)
    if path is not None and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(told) + "\n")


@pytest.fixture(autouse=True)
def usable_device() -> Iterator[None]:
    """After an access out of bounds nothing runs any more in a process: another one goes on with the tests that are left."""
    with np.errstate(all="ignore"):  # Triton's interpreter computes by NumPy, which warns of what IEEE 754 defines
        yield
    if not REHEARSAL and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"the CUDA context is lost: {error}", file=sys.stderr, flush=True)
            os._exit(1)
