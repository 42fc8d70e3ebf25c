"""The device, the cores and the process group of a rank."""

from __future__ import annotations

import gc
import json
import os
import socket
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from launch.errors import ConfigError
from launch.launchers import SRUN, TORCHRUN, RankInfo
from launch.rendezvous import RendezvousStore, join_attempt, open_store

__all__ = ["cores_here", "cores_of_machine", "gpus_here", "pick_device", "set_threads", "share_cores", "start", "stop"]

TIMEOUT = timedelta(seconds=300)  # for a rendezvous, and for a collective: far longer than either takes here


def gpus_here() -> int:
    """Return the number of GPUs that this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def pick_device(info: RankInfo, wanted: str) -> torch.device:
    """Return the device of this process.

    Raises:
        ConfigError: `wanted` is "cuda", and there are not enough GPUs.
    """
    gpus = gpus_here()
    enough = gpus >= info.local_world_size  # NCCL does not let two ranks share a GPU
    # Slurm may be configured to show each task its own GPU only.
    index = info.local_rank if enough else 0
    enough = enough or (gpus == 1 and info.launcher is SRUN and "SLURM_STEP_GPUS" in os.environ)
    if wanted == "cuda" and not enough:
        raise ConfigError(f"device='cuda' needs a GPU for each of the {info.local_world_size} processes here, there are {gpus}")
    return torch.device("cuda", index) if enough and wanted != "cpu" else torch.device("cpu")


def cores_here() -> set[int]:
    """Return the cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def share_cores(processes: int, threads: int | None = None, cores: set[int] | None = None) -> None:
    """Set OMP_NUM_THREADS to an equal share of the cores for each process of this machine, unless the user has chosen a number.

    More threads than cores make a small model several times slower; torchrun's default of one thread leaves cores idle.

    Args:
        processes: the number of processes on this machine.
        threads: the number of threads that the user has chosen in the config; None: the equal share.
        cores: the cores that the processes may use together; None: those of this process.
    """
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(cores or cores_here()) // processes)))


def cores_of_machine(info: RankInfo, store: Store) -> set[int]:
    """Return the cores that the ranks of this machine may use together; a launcher may have bound each rank to a few of them."""
    first = info.rank - info.local_rank  # launchers number the ranks of a machine consecutively
    own = cores_here()
    store.set(f"cores/{info.rank}", json.dumps([socket.gethostname(), sorted(own)]))
    shared = [json.loads(store.get(f"cores/{rank}")) for rank in range(first, first + info.local_world_size) if rank < info.world_size]
    return own.union(*(cores for host, cores in shared if host == socket.gethostname()))


def set_threads(info: RankInfo, threads: int | None, cores: set[int]) -> None:
    """Set the number of threads, the same under every launcher, as the rounding of sums depends on it.

    By default Open MPI binds a rank to one core. A rank with fewer cores than threads is bound to the cores of all ranks on its machine.

    Args:
        info: the rank of this process.
        threads: see `share_cores`.
        cores: the cores of all ranks on this machine.
    """
    if info.launcher is TORCHRUN and os.environ.get("OMP_NUM_THREADS") == "1":
        del os.environ["OMP_NUM_THREADS"]  # torchrun's default, not the user's choice, which is threads=1
    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        share_cores(info.local_world_size, threads, cores)
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if len(cores_here()) < min(torch.get_num_threads(), len(cores)):
        os.sched_setaffinity(0, cores)


def start(info: RankInfo, device: torch.device, threads: int | None = None) -> RendezvousStore:
    """Start the process group, also for a single process, so that no other code needs a special case.

    Args:
        info: the rank of this process.
        device: the device of this process; NCCL connects GPUs, gloo everything else.
        threads: see `share_cores`.

    Returns:
        The store of this attempt, which no other attempt uses.

    Raises:
        RendezvousError: not all ranks joined.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Makes repeated runs of a config give the same metrics, as they do on the CPU without this.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]  # costs a write of each tensor
    for name, value in (("RANK", info.rank), ("WORLD_SIZE", info.world_size), ("LOCAL_RANK", info.local_rank)):
        os.environ.setdefault(name, str(value))  # DeepSpeed reads them, also in a single process
    opened = open_store(info, TIMEOUT)
    store = join_attempt(opened.store, info, TIMEOUT)
    set_threads(info, threads, cores_of_machine(info, store))
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, store=store, rank=info.rank, world_size=info.world_size, timeout=TIMEOUT, device_id=device_id)
    return replace(opened, store=store)


def stop() -> None:
    """End the process group. Not to be called after an error: it would wait for ranks that are stuck in a collective."""
    # Wrapped models are reference cycles that hold process groups. A gloo group that still exists when the interpreter ends can abort it:
    # with torch 2.13, FSDP2 and torch's own AdamW in 3 of 22 runs without this line, and in none of 26 with it.
    gc.collect()
    dist.destroy_process_group()
