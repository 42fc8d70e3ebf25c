"""Run a function on gloo ranks, each a process of its own.

A test calls `run(checks, world_size)`. What a rank raises is raised in the test, and ranks that hang are ended after `TIMEOUT`. Ranks are
forked from a server that has imported what they need (rank_server.py): imports alone would take each of them seconds.
"""

from __future__ import annotations

import datetime
import gc
import os
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TESTS = Path(__file__).parent
TIMEOUT = 90.0  # seconds for all ranks together


def run(function: Callable[..., None], world_size: int, *args: Any, timeout: float = TIMEOUT) -> None:
    """Call `function(*args)` in `world_size` processes that form the default process group."""
    context = mp.get_context("forkserver")
    _start_server()
    with tempfile.TemporaryDirectory() as folder:
        errors = context.SimpleQueue()
        ranks = [
            context.Process(
                target=_rank, args=(function, rank, world_size, os.path.join(folder, "store"), errors, args, dict(os.environ)), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        deadline = datetime.datetime.now() + datetime.timedelta(seconds=timeout)
        for process in ranks:
            process.join(max(0.0, (deadline - datetime.datetime.now()).total_seconds()))
        hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for process in ranks:
            process.kill()
        failures = []
        while not errors.empty():
            failures.append(errors.get())
        if hung:
            failures.append(f"ranks {hung} of {world_size} did not finish within {timeout} s")
        died = [rank for rank, process in enumerate(ranks) if rank not in hung and process.exitcode]
        if died and not failures:
            failures.append(f"ranks {died} of {world_size} died without an exception")
    assert not failures, "\n".join(failures)


@cache
def _start_server() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # which DeepSpeed asks for when it is imported
    forkserver.set_forkserver_preload(["rank_server"])
    with pytest.MonkeyPatch.context() as patch:
        folders = filter(os.path.isdir, (TESTS, *TESTS.iterdir()))
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)), prepend=os.pathsep)  # where the server finds what it is to import
        forkserver.ensure_running()


def _rank(
    function: Callable[..., None], rank: int, world_size: int, store: str, errors: Any, args: tuple[Any, ...], environment: dict[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(environment)  # the test's: the server has the one in which it was started
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=30)
        )
        function(*args)
        dist.barrier()
    except BaseException:
        errors.put(f"--- rank {rank} of {world_size} ---\n{traceback.format_exc()}")
        raise SystemExit(1) from None
    finally:
        gc.collect()  # wrapped models are cycles that hold process groups, which must not outlive the interpreter
        if dist.is_initialized():
            dist.destroy_process_group()
