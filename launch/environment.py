"""Where this process stands among the others: the one file that reads environment variables and starts and ends the process group."""

from __future__ import annotations

import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.config import Config, ConfigError

if TYPE_CHECKING:  # the parent process uses this module too, and need not wait for torch
    import torch

__all__ = ["Place", "find_place", "pick_device", "prepare_for_deepspeed", "share_cores", "start", "stop"]

TIMEOUT_SECONDS = 300  # of a collective: far longer than any takes here, and soon enough to notice a rank that died


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which of the processes this is; `local` counts those on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def share_cores(processes: int) -> None:
    """Give the processes that this one starts an equal share of the cores, unless the user has chosen.

    More threads than cores make a small model several times slower; torchrun's default of one thread leaves cores idle.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))


def find_place(config: Config) -> Place:
    """Read the variables of torchrun or of the deepspeed launcher; without any, this process is alone.

    Raises:
        ConfigError: the variables are incomplete, or there are not as many processes as the config says.
    """
    names = {"rank": "RANK", "world_size": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_world_size": "LOCAL_WORLD_SIZE"}
    if "LOCAL_SIZE" in os.environ and "LOCAL_WORLD_SIZE" not in os.environ:
        names["local_world_size"] = "LOCAL_SIZE"  # the deepspeed launcher's name for it
    found = {field: os.environ[name] for field, name in names.items() if name in os.environ}
    missing = [name for field, name in names.items() if field not in found]
    if found and missing:
        raise ConfigError(f"{', '.join(missing)} not in the environment, but the rest of torchrun's variables are; start with torchrun")
    try:
        place = Place(**{field: int(value) for field, value in found.items()})
    except ValueError:
        raise ConfigError(f"torchrun's variables must be whole numbers, got {found}") from None
    if place.world_size != config.processes:
        raise ConfigError(
            f"processes={config.processes}, but {place.world_size} started; use `python -m launch`, "
            f"`torchrun --nproc-per-node {config.processes} -m launch.train`, or processes={place.world_size}"
        )
    return place


def prepare_for_deepspeed(device: str) -> Path:
    """Tell DeepSpeed, in this process and in those that it starts, what it runs on and where it keeps what it compiles.

    Args:
        device: "cpu" or "cuda".

    Returns:
        The folder of what it compiles.

    Raises:
        ConfigError: the user has told it to run on something else.
    """
    chosen = os.environ.setdefault("DS_ACCELERATOR", device)
    if chosen != device:
        raise ConfigError(f"DS_ACCELERATOR={chosen!r} in the environment, but the job runs on {device!r}; unset it, or use device={chosen}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    scripts = sysconfig.get_path("scripts")  # where a virtual environment has ninja, which need not be activated
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, (os.environ.get("PATH"), scripts)))
    return Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache / "sharded_optim" / "torch_extensions")))


def pick_device(place: Place, wanted: str) -> torch.device:
    """This process's device.

    Raises:
        ConfigError: GPUs are asked for and there are not enough.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    enough = gpus >= place.local_world_size  # NCCL does not let two ranks share one
    if wanted == "cuda" and not enough:
        raise ConfigError(f"device='cuda' needs a GPU for each of the {place.local_world_size} processes here, there are {gpus}")
    return torch.device("cuda", place.local_rank) if enough and wanted != "cpu" else torch.device("cpu")


def start(place: Place, device: torch.device) -> None:
    """Start the process group, also for a process that is alone: then nothing else has to know the difference."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.set_device(device)
        # The same config twice gives the same metrics. On the CPU this holds as it is.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]  # costs a write of each
    if "OMP_NUM_THREADS" not in os.environ:  # neither `python -m launch` nor torchrun has started this
        share_cores(place.local_world_size)
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))  # DeepSpeed reads it, also in a process that is alone
    alone = place.world_size == 1  # then there may be no torchrun to meet the others through, and no others
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=dist.HashStore() if alone else None,  # pyright: ignore[reportPrivateImportUsage]  # public in the documentation
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
        device_id=device if device.type == "cuda" else None,
    )


def stop() -> None:
    """End the process group. Not after an error: it would wait for ranks that are stuck in a collective, and torchrun ends those."""
    import gc

    import torch.distributed as dist

    # Wrapped models are reference cycles that hold process groups. A gloo group that lives until the interpreter ends can abort it: seen
    # with torch 2.13, FSDP2 and torch's own AdamW in 3 of 22 runs, and with this line in none of 26.
    gc.collect()
    dist.destroy_process_group()
