"""Run a function on gloo ranks, each a process of its own.

A test marked `@pytest.mark.ranks(2)` runs on two ranks; other tests call `run(function, world_size)`. What a rank raises is raised in the
test. The tests of a module share its ranks, as starting ranks takes longer than most tests. After a test that failed or that replaced the
default process group, the next one gets new ranks. Ranks are forked from a server that has imported what they need (rank_server.py):
imports alone would take each of them seconds.
"""

from __future__ import annotations

import datetime
import faulthandler
import gc
import inspect
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.modules import module as modules
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

TESTS = Path(__file__).parent
TIMEOUT = 90.0  # seconds for all ranks together
KEPT = "kept"  # what a rank answers when it can run another test
REPLACED = "replaced"  # when its default process group is no longer the one that it began with

_pools: dict[int, RankPool] = {}  # of this module of tests, by world size


def run(function: Callable[..., None], world_size: int, /, *args: Any, timeout: float = TIMEOUT, **kwargs: Any) -> None:
    """Call `function(*args, **kwargs)` in `world_size` processes that form the default process group."""
    pool = _pools.pop(world_size, None) or RankPool(world_size)
    answers = pool.call(function, args, kwargs, timeout)
    failures = [answer for answer in answers if answer not in (KEPT, REPLACED)]
    if failures:
        pool.kill()
    elif REPLACED in answers:
        failures = pool.close()
    else:
        _pools[world_size] = pool
    assert not failures, "\n".join(failures)


def close() -> None:
    """End the ranks that are kept, and raise if one does not end well."""
    failures = [failure for pool in _pools.values() for failure in pool.close()]
    _pools.clear()
    assert not failures, "\n".join(failures)


class RankPool:
    """Processes that form a process group and run one function after another."""

    def __init__(self, world_size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._connections: list[Connection] = []
        self._processes = []
        _start_server()
        context = mp.get_context("forkserver")
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, self._folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def call(self, function: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any], timeout: float) -> list[str]:
        """Call a function on every rank. An answer is `KEPT`, `REPLACED`, or the traceback or loss of a rank."""
        call = pickle.dumps((function, args, kwargs, dict(os.environ)))  # tensors by value: ranks share no memory
        for connection in self._connections:
            try:
                connection.send_bytes(call)
            except OSError:  # the rank is lost, as its answer will say
                continue
        deadline = time.monotonic() + timeout
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        answers, lost = [], []
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    answers.append(connection.recv())
                except (EOFError, OSError):
                    lost.append(rank)
        if waiting:
            answers.append(self._stacks_of(list(waiting.values()), timeout))
        if lost:
            answers.append(f"ranks {lost} of {len(self._connections)} died without an exception")
        return answers

    def _stacks_of(self, hung: list[int], timeout: float) -> str:
        """Say which ranks hang, and where."""
        for rank in hung:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        lines = [f"ranks {hung} of {len(self._processes)} did not finish within {timeout} s"]
        for rank in hung:
            lines += [f"--- rank {rank} hangs, most recent call first ---", _stack_file(self._folder.name, rank).read_text()]
        return "\n".join(lines)

    def close(self, timeout: float = 20.0) -> list[str]:
        """Let the ranks end, and return what went wrong."""
        for connection in self._connections:
            connection.close()
        deadline = time.monotonic() + timeout
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        failed = {rank: process.exitcode for rank, process in enumerate(self._processes) if process.exitcode != 0}
        self.kill()
        return [f"ranks ended with exit codes {failed}; None: not within {timeout} s"] if failed else []

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._folder.cleanup()


def _stack_file(folder: str, rank: int) -> Path:
    return Path(folder, f"stack{rank}")


@cache
def _start_server() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # which DeepSpeed asks for when it is imported
    forkserver.set_forkserver_preload(["rank_server"])
    with pytest.MonkeyPatch.context() as patch:
        folders = filter(os.path.isdir, (TESTS, *TESTS.iterdir()))
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)), prepend=os.pathsep)  # where the server finds what it is to import
        forkserver.ensure_running()


def _serve(rank: int, world_size: int, folder: str, connection: Connection) -> None:
    """Run one function after another, until the connection is closed or one fails. Then the others lose this rank's process group."""
    torch.set_num_threads(1)
    stack = _stack_file(folder, rank).open("w")
    faulthandler.register(signal.SIGUSR1, file=stack)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=30)
        )
        default_group = dist.group.WORLD
        while True:
            try:
                call = connection.recv_bytes()
            except EOFError:
                return
            _call(*pickle.loads(call))
            dist.barrier()
            connection.send(KEPT if dist.group.WORLD is default_group else REPLACED)
    except BaseException:
        connection.send(f"--- rank {rank} of {world_size} ---\n{traceback.format_exc()}")
        raise SystemExit(1) from None
    finally:
        gc.collect()  # wrapped models are cycles that hold process groups, which must not outlive the interpreter
        if dist.is_initialized():
            dist.destroy_process_group()


def _call(function: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any], environment: dict[str, str]) -> None:
    """Call a function as if no other had been called before.

    Raises:
        AssertionError: it has changed what the next function would meet.
    """
    os.environ.clear()
    os.environ.update(environment)  # the test's: the server has the one in which it was started
    torch.manual_seed(0)
    random.seed(0)
    folder = os.getcwd()
    before = _settings() | _definitions()
    with warnings.catch_warnings():
        function(*args, **kwargs)
    os.chdir(folder)
    # The objects of this function end with it. The collector need not look through what it imported in each later function.
    gc.collect()
    gc.freeze()
    after = _settings() | _definitions()
    changed = {name: after[name] for name in before.keys() & after.keys() if after[name] != before[name]}
    assert not changed, f"{function} has not restored {', '.join(changed)}: {changed}"


def _settings() -> dict[str, Any]:
    """What belongs to a process and changes what functions that are called later do."""
    return {
        "the default dtype": torch.get_default_dtype(),
        "the default device": torch.get_default_device(),
        "whether gradients are recorded": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the number of threads": torch.get_num_threads(),
        "whether conversion swaps parameters": torch.__future__.get_swap_module_params_on_conversion(),
        "whether the garbage collector runs": gc.isenabled(),
        "hooks of all modules": [len(modules._global_forward_pre_hooks), len(modules._global_forward_hooks)],
        "hooks of all optimizers": [len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)],
    }


def _definitions() -> dict[str, Any]:
    """Functions, classes, methods and constants of the package, by identity: what tests replace."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "sharded_optim":
            for key, value in vars(module).items():
                if isinstance(value, FunctionType | type) or key.isupper():
                    found[f"{name}.{key}"] = id(value)
                if isinstance(value, type) and value.__module__ == name:
                    for method, each in vars(value).items():
                        if isinstance(each, FunctionType):  # torch wraps `step` of an optimizer
                            found[f"{name}.{key}.{method}"] = id(inspect.unwrap(each) if hasattr(each, "__wrapped__") else each)
    return found
