"""Gloo ranks of one thread each that measure something together.

They are forked from a server that has imported what they need and has started no thread: imports would take each of them seconds.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["start"]


def start(
    work: Callable[[], dict[str, Any]], *, world_size: int, imported: Sequence[str], environment: dict[str, str], timeout: timedelta
) -> dict[str, Any]:
    """Start ranks that do `work`, and give back what rank 0 found.

    Args:
        work: returns what JSON holds.
        world_size: how many ranks.
        imported: modules that the server imports.
        environment: variables of the ranks.
        timeout: of a collective.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([*imported])
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(  # pyright: ignore[reportPrivateImportUsage]
            _rank,
            args=(world_size, folder, environment | _address(world_size), timeout, work),
            nprocs=world_size,
            start_method="forkserver",
        )
        return json.loads((Path(folder) / "found.json").read_text())


def _rank(
    rank: int, world_size: int, folder: str, environment: dict[str, str], timeout: timedelta, work: Callable[[], dict[str, Any]]
) -> None:
    """Do `work` on a rank; rank 0 writes down what it found."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print; standard output is for the report
    warnings.simplefilter("ignore")
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timeout)
    found = work()
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    gc.collect()  # wrapped models are cycles that hold process groups, which must not outlive the interpreter
    dist.destroy_process_group()


def _address(world_size: int) -> dict[str, str]:
    """DeepSpeed reads it, also when the process group is there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(world_size)}
