"""What holds for every process of the tests; pytest imports this file before anything that starts a thread."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import ranks
import torch
from fake_device import FakeEvent
from hypothesis import settings
from triton_interpreter import interpreted

# The tests run side by side, in more threads and ranks than there are cores. A thread of OpenMP that waits for others by spinning, as it
# does unless told otherwise, then takes the core from those it waits for: steps of small tensors become ten to thirty times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Where DeepSpeed keeps what it compiles: with the environment that is tested. In the user's cache, another run may be compiling, or may
# have been killed and have left its lock.
EXTENSIONS = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix, "torch_extensions"))))
SECONDS_OF_A_BUILD = 300.0  # at most
# Likewise Triton's: machine code names the files that it was compiled from, which another copy of this repository has elsewhere.
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(sys.prefix, "triton_cache")))

# The longest, so that no process is left alone with one of them at the end. The first has DeepSpeed's extension compiled, for which the
# others that need it would wait.
FIRST = (
    "test_deepspeed.py",
    "test_invariance.py",
    "test_launch_train.py",
    "test_survival.py",
    "test_zero.py",
    "test_checkpoint_reshard.py",
    "test_checkpoint_import.py",
    "test_every_wrapper.py",
    "test_muon_sharding.py",
    "test_distributed_checkpoint.py",
    "test_backends.py",
    "test_training.py",
    "test_doctor.py",
    "test_jobs.py",
    "test_gradient_release.py",
    "test_deepspeed_checkpoints.py",
    "test_zero_checkpoints.py",
)

settings.register_profile("matrix", max_examples=10 * settings.get_profile("default").max_examples)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", action="store_true", help="all cells of every matrix, and ten times as many of Hypothesis' examples")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--matrix"):
        settings.load_profile("matrix")
    for lock in EXTENSIONS.glob("*/lock"):
        with suppress(FileNotFoundError):  # another process of these tests has removed it
            if time.time() - lock.stat().st_mtime > SECONDS_OF_A_BUILD:
                lock.unlink()


@pytest.fixture
def everything(request: pytest.FixtureRequest) -> bool:
    """Whether a test runs all cells of its matrix: otherwise those in which each option, dtype and wrapper occurs, but not each pair."""
    return bool(request.config.getoption("--matrix"))


@pytest.fixture
def interpreter() -> Iterator[None]:
    """Triton's, in which its kernels run."""
    pytest.importorskip("triton", reason="the triton package is not installed")
    with interpreted():
        yield


@pytest.fixture
def cpu_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from sharded_optim.backends import eager
    from sharded_optim.step import agreement, engine, kernel_call, param_groups

    for module in (eager, agreement, engine, kernel_call, param_groups):
        monkeypatch.setattr(module, "known_on_host", lambda tensor: False)
    monkeypatch.setattr(torch, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "waits", 0)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is marked `ranks(2)` on two ranks; one that is marked `ranks`, on as many as its argument `world_size` says."""
    mark = pyfuncitem.get_closest_marker("ranks")
    if mark is None:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    world_size = mark.args[0] if mark.args else arguments["world_size"]
    failure = None
    try:
        ranks.run(pyfuncitem.obj, world_size, **mark.kwargs, **arguments)
    except AssertionError as error:
        failure = str(error)
    if failure is not None:
        pytest.fail(failure, pytrace=False)  # the ranks' tracebacks say where
    return True


@pytest.fixture(scope="module", autouse=True)
def end_ranks() -> Iterator[None]:
    """The tests of a module share ranks, but no two modules."""
    yield
    ranks.close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first: `make test` gives files to processes in this order. Whole matrices take their time."""
    if config.getoption("--matrix"):
        for item in items:
            item.add_marker(pytest.mark.timeout(7200), append=False)
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(FIRST)))


def pytest_collection_finish() -> None:
    """What was imported and collected stays: the garbage collector need not look through all of it again and again."""
    gc.collect()
    gc.freeze()
