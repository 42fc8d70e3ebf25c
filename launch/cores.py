"""Cores and threads: each rank of a machine gets an equal share, under every launcher."""

from __future__ import annotations

import json
import os
import socket

import torch
from torch.distributed.distributed_c10d import Store

from launch.launchers import TORCHRUN, RankInfo

__all__ = ["cores_here", "cores_of_machine", "set_threads", "share_cores"]


def cores_here() -> set[int]:
    """Return the cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def share_cores(processes: int, threads: int | None = None, cores: set[int] | None = None) -> None:
    """Give each of the processes of this machine an equal share of the cores, unless the user has chosen.

    More threads than cores make a small model several times slower; torchrun's default of one thread leaves cores idle.

    Args:
        processes: of this machine.
        threads: the number of threads that the user has chosen in the config; None: the share.
        cores: the cores that the processes may use together; None: those of this process.
    """
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(cores or cores_here()) // processes)))


def cores_of_machine(info: RankInfo, store: Store) -> set[int]:
    """Return the cores that the ranks of this machine may use together; a launcher may have bound each rank to a few of them."""
    first = info.rank - info.local_rank  # launchers number the ranks of a machine one after the other
    own = cores_here()
    store.set(f"cores/{info.rank}", json.dumps([socket.gethostname(), sorted(own)]))
    shared = [json.loads(store.get(f"cores/{rank}")) for rank in range(first, first + info.local_world_size) if rank < info.world_size]
    return own.union(*(cores for host, cores in shared if host == socket.gethostname()))


def set_threads(info: RankInfo, threads: int | None, cores: set[int]) -> None:
    """Set the number of threads, the same under every launcher: sums depend on it.

    Open MPI binds a rank to one core by default: a rank with fewer cores than threads is bound to the cores of all its machine's ranks.

    Args:
        info: of this process.
        threads: see `share_cores`.
        cores: of this machine's ranks together.
    """
    if info.launcher is TORCHRUN and os.environ.get("OMP_NUM_THREADS") == "1":
        del os.environ["OMP_NUM_THREADS"]  # torchrun's default, not the user's choice, which is threads=1
    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        share_cores(info.local_world_size, threads, cores)
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if len(cores_here()) < min(torch.get_num_threads(), len(cores)):
        os.sched_setaffinity(0, cores)
