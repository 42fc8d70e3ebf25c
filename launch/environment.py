"""Where this process stands among the others: reads what launchers say in environment variables, starts and ends the process group.

torchrun, the deepspeed launcher, mpirun (Open MPI's and MPICH's) and srun each say it in variables of their own. What they have in common
is a `Place`; how the ranks then find each other is in `meeting.py`.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from launch.config import Config, ConfigError

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import Store

    from launch.meeting import Venue

__all__ = [
    "Place",
    "find_place",
    "gpus_here",
    "is_restart",
    "launcher_of",
    "pick_device",
    "prepare_for_deepspeed",
    "share_cores",
    "start",
    "stop",
]

TIMEOUT_SECONDS = 300  # of a meeting and of a collective: far longer than any takes here, and soon enough to notice that one will not end
# torchrun hands these signals on to its ranks, by default no SIGUSR1. They then have so many seconds to save, by default 30. As options,
# the first would be refused by torch < 2.10, the second by torch < 2.12; such variables they ignore.
TORCHRUN_OPTIONS = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "PET_SHUTDOWN_TIMEOUT": "100"}
# srun gives no port. One for each job, so that jobs that share a node hardly meet, and outside of what systems give out by themselves.
SLURM_PORTS = range(10000, 30000)


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """Who has started this process.

    Attributes:
        name: as messages have it.
        variables: where it says what `Place` has, by the name there.
        mark: the variables by which it is recognised; any of them.
    """

    name: str
    variables: Mapping[str, str]
    mark: tuple[str, ...] = ()


def _variables(*names: str) -> dict[str, str]:
    return dict(zip(("rank", "world_size", "local_rank", "local_world_size"), names, strict=True))


ALONE = Launcher(name="python", variables={})
TORCHRUN_VARIABLES = _variables("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
TORCHRUN = Launcher(name="torchrun", variables=TORCHRUN_VARIABLES, mark=tuple(TORCHRUN_VARIABLES.values()))
DEEPSPEED = Launcher(name="deepspeed", variables=_variables("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
OPEN_MPI = Launcher(
    name="Open MPI's mpirun",
    variables=_variables("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    mark=("OMPI_COMM_WORLD_RANK",),
)
MPICH = Launcher(
    name="MPICH's mpirun",
    variables=_variables("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    mark=("MPI_LOCALRANKID",),  # srun may set PMI_RANK
)
SRUN = Launcher(
    name="srun",
    variables=_variables("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    mark=("SLURM_STEP_NUM_TASKS",),  # batch scripts and shells in an allocation have a SLURM_PROCID too
)
# In this order: torchrun may be started by srun or mpirun, and mpirun by srun.
LAUNCHERS = (TORCHRUN, OPEN_MPI, MPICH, SRUN)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which of the processes this is; `local` counts those on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: Launcher = ALONE


# ----------------------------------------------------------------------------------------------------------------- before torch


def find_place(config: Config) -> Place:
    """Read the variables of whatever has started this process; without any, it is alone.

    Raises:
        ConfigError: the variables are incomplete, or there are not as many processes as the config says.
    """
    launcher = next((each for each in LAUNCHERS if any(name in os.environ for name in each.mark)), ALONE)
    if launcher is TORCHRUN and "LOCAL_SIZE" in os.environ and "LOCAL_WORLD_SIZE" not in os.environ:
        launcher = DEEPSPEED
    found = {field: os.environ[name] for field, name in launcher.variables.items() if name in os.environ}
    missing = [name for name in launcher.variables.values() if name not in os.environ]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} not in the environment, but the rest of {launcher.name}'s variables are; start with torchrun, mpirun or "
            f"srun, or unset {', '.join(name for name in launcher.variables.values() if name in os.environ)}"
        )
    if launcher is SRUN:
        found["local_world_size"] = _tasks_of_node(found["local_world_size"], os.environ.get("SLURM_NODEID", "0"))
    try:
        place = Place(**{field: int(value) for field, value in found.items()}, launcher=launcher)
    except ValueError:
        raise ConfigError(f"{launcher.name}'s variables must be whole numbers, got {found}") from None
    if config.processes not in ("auto", place.world_size):
        raise ConfigError(
            f"processes={config.processes}, but {place.world_size} started; use `python -m launch`, "
            f"`torchrun --nproc-per-node {config.processes} -m launch.train`, or processes={place.world_size}"
        )
    return place


def _tasks_of_node(counts: str, node: str) -> str:
    """How many tasks a node has, of Slurm's short list of counts.

    >>> [_tasks_of_node("2(x3),1", node) for node in "0123"]
    ['2', '2', '2', '1']
    """
    found: list[str] = []
    for each in counts.split(","):
        count, _, times = each.partition("(x")
        found += [count] * int(times.rstrip(")") or 1)
    return found[int(node)]


def launcher_of(place: Place) -> int | None:
    """The pid of what has started this process and is there as long as the job; None where that may be a shell that is left."""
    is_by_hand = place.launcher is ALONE or (place.launcher is TORCHRUN and "TORCHELASTIC_RUN_ID" not in os.environ)
    return None if is_by_hand else os.getppid()


def is_restart() -> bool:
    """Whether torchrun has started this process again, after a failure."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def cores_here() -> set[int]:
    """The cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def share_cores(processes: int, threads: int | None = None, cores: set[int] | None = None) -> None:
    """Give each of the processes of this machine an equal share of the cores, unless the user has chosen.

    More threads than cores make a small model several times slower; torchrun's default of one thread leaves cores idle.

    Args:
        processes: of this machine.
        threads: what the user has chosen in the config.
        cores: that they may use together; None: each of them those of this process.
    """
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(cores or cores_here()) // processes)))


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


# ------------------------------------------------------------------------------------------------------------------- with torch


def gpus_here() -> int:
    """How many GPUs this process sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def pick_device(place: Place, wanted: str) -> torch.device:
    """This process's device.

    Raises:
        ConfigError: GPUs are asked for and there are not enough.
    """
    import torch

    gpus = gpus_here()
    enough = gpus >= place.local_world_size  # NCCL does not let two ranks share one
    # Slurm, told so, shows each task its own GPU alone.
    index = place.local_rank if enough else 0
    enough = enough or (gpus == 1 and place.launcher is SRUN and "SLURM_STEP_GPUS" in os.environ)
    if wanted == "cuda" and not enough:
        raise ConfigError(f"device='cuda' needs a GPU for each of the {place.local_world_size} processes here, there are {gpus}")
    return torch.device("cuda", index) if enough and wanted != "cpu" else torch.device("cpu")


def start(place: Place, device: torch.device, threads: int | None = None) -> Venue:
    """Start the process group, also for a process that is alone: then nothing else has to know the difference.

    Args:
        place: of this process.
        device: of this process; NCCL connects GPUs, gloo everything else.
        threads: see `share_cores`.

    Returns:
        Where the ranks have met: a store of this attempt alone.

    Raises:
        MeetingError: not all ranks came.
    """
    import torch
    import torch.distributed as dist

    from launch import meeting

    if device.type == "cuda":
        torch.cuda.set_device(device)
        # The same config twice gives the same metrics. On the CPU this holds as it is.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]  # costs a write of each
    for name, value in (("RANK", place.rank), ("WORLD_SIZE", place.world_size), ("LOCAL_RANK", place.local_rank)):
        os.environ.setdefault(name, str(value))  # DeepSpeed reads them, also in a process that is alone
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    venue = _venue(place, timeout)
    store = meeting.attempt(venue.store, place.rank, place.world_size, timeout, launcher_of(place))
    _set_threads(place, threads, _cores_of_machine(place, store))
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    return replace(venue, store=store)


def _cores_of_machine(place: Place, store: Store) -> set[int]:
    """The cores that the ranks of this machine may use together, of which a launcher may have bound each to a few."""
    first = place.rank - place.local_rank  # launchers number the ranks of a machine one after the other
    own = cores_here()
    store.set(f"cores/{place.rank}", json.dumps([socket.gethostname(), sorted(own)]))
    told = [json.loads(store.get(f"cores/{rank}")) for rank in range(first, first + place.local_world_size) if rank < place.world_size]
    return own.union(*(cores for host, cores in told if host == socket.gethostname()))


def _set_threads(place: Place, threads: int | None, cores: set[int]) -> None:
    """The same number of threads, and so the same sums, whatever has started this process.

    Open MPI binds a rank to one core unless told otherwise: a rank that has fewer cores than threads may use all of its machine's ranks'.
    """
    import torch

    if place.launcher is TORCHRUN and os.environ.get("OMP_NUM_THREADS") == "1":
        del os.environ["OMP_NUM_THREADS"]  # torchrun's own default, which nobody has chosen; threads=1 says that somebody has
    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        share_cores(place.local_world_size, threads, cores)
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if len(cores_here()) < min(torch.get_num_threads(), len(cores)):
        os.sched_setaffinity(0, cores)


def _venue(place: Place, timeout: timedelta) -> Venue:
    """The store of whatever has started this process, or one that rank 0 has served."""
    from launch import meeting

    if place.world_size == 1:  # there may be nothing to meet the others through, and no others
        return meeting.alone()
    if place.launcher in (OPEN_MPI, MPICH):
        return meeting.through_mpi(place.rank, place.world_size, os.environ.get("MASTER_ADDR"), timeout)
    if place.launcher is SRUN:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "localhost")
        address = os.environ.get("MASTER_ADDR") or _first_host(nodes)
        job = int(os.environ.get("SLURM_JOB_ID", "0"))
        port = int(os.environ.get("MASTER_PORT") or SLURM_PORTS[job % len(SLURM_PORTS)])
        return meeting.through_address(address, port, place.rank, place.world_size, timeout)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"{', '.join(missing)} not in the environment, where ranks meet; start with torchrun, mpirun or srun")
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_there = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return meeting.through_address(address, port, place.rank, place.world_size, timeout, is_there=is_there)


def _first_host(nodes: str) -> str:
    """Of Slurm's short list of hosts.

    >>> [_first_host(nodes) for nodes in ("gpu7", "gpu[012-014,20],cpu1", "a-[3,5]-ib")]
    ['gpu7', 'gpu012', 'a-3-ib']
    """
    found = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    assert found is not None, "it matches an empty text"
    return "".join(part or "" for part in found.groups())


def stop() -> None:
    """End the process group. Not after an error: it would wait for ranks that are stuck in a collective."""
    import gc

    import torch.distributed as dist

    # Wrapped models are reference cycles that hold process groups. A gloo group that lives until the interpreter ends can abort it: seen
    # with torch 2.13, FSDP2 and torch's own AdamW in 3 of 22 runs, and with this line in none of 26.
    gc.collect()
    dist.destroy_process_group()
