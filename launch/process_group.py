"""The device and the process group of a rank."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from launch.cores import cores_of_machine, set_threads
from launch.errors import ConfigError
from launch.launchers import SRUN, RankInfo, launcher_pid
from launch.rendezvous import RendezvousStore, join_attempt, open_store

__all__ = ["gpus_here", "pick_device", "start", "stop"]

TIMEOUT_SECONDS = 300  # of a rendezvous and of a collective: far longer than any takes here


def gpus_here() -> int:
    """Return the number of GPUs that this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def pick_device(info: RankInfo, wanted: str) -> torch.device:
    """Return the device of this process.

    Raises:
        ConfigError: GPUs are asked for and there are not enough.
    """
    gpus = gpus_here()
    enough = gpus >= info.local_world_size  # NCCL does not let two ranks share one
    # Slurm may be configured to show each task its own GPU only.
    index = info.local_rank if enough else 0
    enough = enough or (gpus == 1 and info.launcher is SRUN and "SLURM_STEP_GPUS" in os.environ)
    if wanted == "cuda" and not enough:
        raise ConfigError(f"device='cuda' needs a GPU for each of the {info.local_world_size} processes here, there are {gpus}")
    return torch.device("cuda", index) if enough and wanted != "cpu" else torch.device("cpu")


def start(info: RankInfo, device: torch.device, threads: int | None = None) -> RendezvousStore:
    """Start the process group, also for a single process, so that no other code has to treat that case.

    Args:
        info: of this process.
        device: of this process; NCCL connects GPUs, gloo everything else.
        threads: see `share_cores`.

    Returns:
        The store of this attempt, which no other attempt uses.

    Raises:
        RendezvousError: not all ranks joined.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # So that the same config gives the same metrics twice. On the CPU it does without this.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]  # costs a write of each
    for name, value in (("RANK", info.rank), ("WORLD_SIZE", info.world_size), ("LOCAL_RANK", info.local_rank)):
        os.environ.setdefault(name, str(value))  # DeepSpeed reads them, also in a single process
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    opened = open_store(info, timeout)
    store = join_attempt(opened.store, info, timeout, launcher_pid(info))
    set_threads(info, threads, cores_of_machine(info, store))
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, store=store, rank=info.rank, world_size=info.world_size, timeout=timeout, device_id=device_id)
    return replace(opened, store=store)


def stop() -> None:
    """End the process group. Not after an error: it would wait for ranks that are stuck in a collective."""
    # Wrapped models are reference cycles that hold process groups. A gloo group that exists until the interpreter ends can abort it: seen
    # with torch 2.13, FSDP2 and torch's own AdamW in 3 of 22 runs, and with this line in none of 26.
    gc.collect()
    dist.destroy_process_group()
