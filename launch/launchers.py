"""Launchers, and the environment variables in which they number the ranks that they start.

torchrun, the deepspeed launcher, mpirun (Open MPI's and MPICH's) and srun each use different variables, which are read into a `RankInfo`.
`rendezvous.py` connects the ranks.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

from launch.config import Config, ConfigError

__all__ = ["MPICH", "OPEN_MPI", "SRUN", "TORCHRUN", "TORCHRUN_OPTIONS", "RankInfo", "first_host", "is_restart", "read_rank_info"]

# torchrun forwards these signals to its ranks (by default not SIGUSR1), which then have 100 s to save (by default 30). They are not given
# as command-line options, as torch < 2.10 would refuse the first and torch < 2.12 the second; unknown variables are ignored.
TORCHRUN_OPTIONS = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "PET_SHUTDOWN_TIMEOUT": "100"}


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """A program that starts ranks.

    Attributes:
        name: the name in messages.
        variables: the environment variables with rank, world size, local rank and local world size, in this order.
        mark: variables that only this launcher sets; one of them is enough to detect it.
    """

    name: str
    variables: tuple[str, ...] = ()
    mark: tuple[str, ...] = ()


ALONE = Launcher(name="python")
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
TORCHRUN = Launcher(name="torchrun", variables=TORCHRUN_VARIABLES, mark=TORCHRUN_VARIABLES)
DEEPSPEED = Launcher(name="deepspeed", variables=("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
OPEN_MPI = Launcher(
    name="Open MPI's mpirun",
    variables=("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    mark=("OMPI_COMM_WORLD_RANK",),
)
MPICH = Launcher(
    name="MPICH's mpirun",
    variables=("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    mark=("MPI_LOCALRANKID",),  # srun may set PMI_RANK
)
TASKS_OF_NODES = "SLURM_STEP_TASKS_PER_NODE"
SRUN = Launcher(
    name="srun",
    variables=("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", TASKS_OF_NODES),
    mark=("SLURM_STEP_NUM_TASKS",),  # batch scripts and shells in an allocation have a SLURM_PROCID too
)
# In order of detection, the innermost first: torchrun may be started by srun or mpirun, and mpirun by srun.
LAUNCHERS = (TORCHRUN, OPEN_MPI, MPICH, SRUN)


@dataclass(frozen=True)
class RankInfo:
    """Rank and world size of this process, among all ranks and among the ranks of its machine (`local`).

    Attributes:
        launcher_pid: pid of the launcher, which runs as long as the job; None if the parent process may be a shell that ends earlier.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: Launcher = ALONE
    launcher_pid: int | None = field(default=None, compare=False)


def read_rank_info(config: Config) -> RankInfo:
    """Read the launcher's environment variables; without them, this process is the only rank.

    Raises:
        ConfigError: the variables are incomplete or no whole numbers, or the number of processes is not the config's.
    """
    launcher = next((launcher for launcher in LAUNCHERS if any(name in os.environ for name in launcher.mark)), ALONE)
    if launcher is TORCHRUN and "LOCAL_SIZE" in os.environ and "LOCAL_WORLD_SIZE" not in os.environ:
        launcher = DEEPSPEED
    values = {name: os.environ[name] for name in launcher.variables if name in os.environ}
    missing = [name for name in launcher.variables if name not in values]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} not in the environment, but the rest of {launcher.name}'s variables are; start with torchrun, mpirun or "
            f"srun, or unset {', '.join(values)}"
        )
    if launcher is SRUN:
        values[TASKS_OF_NODES] = _tasks_of_node(values[TASKS_OF_NODES], os.environ.get("SLURM_NODEID", "0"))
    is_by_hand = launcher is ALONE or (launcher is TORCHRUN and "TORCHELASTIC_RUN_ID" not in os.environ)
    try:
        info = RankInfo(*map(int, values.values()), launcher=launcher, launcher_pid=None if is_by_hand else os.getppid())
    except ValueError:
        raise ConfigError(f"{launcher.name}'s variables must be whole numbers, got {values}") from None
    if config.processes not in ("auto", info.world_size):
        raise ConfigError(
            f"processes={config.processes}, but {info.world_size} started; use `python -m launch`, "
            f"`torchrun --nproc-per-node {config.processes} -m launch.train`, or processes={info.world_size}"
        )
    return info


def _tasks_of_node(counts: str, node: str) -> str:
    """Return the number of tasks of one node, from Slurm's abbreviated list of counts.

    >>> [_tasks_of_node("2(x3),1", node) for node in "0123"]
    ['2', '2', '2', '1']
    """
    tasks: list[str] = []
    for entry in counts.split(","):
        count, _, nodes = entry.partition("(x")
        tasks += [count] * int(nodes.rstrip(")") or 1)
    return tasks[int(node)]


def is_restart() -> bool:
    """Return whether torchrun has restarted this process after a failure."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def first_host(nodes: str) -> str:
    """Return the first host of Slurm's abbreviated list of hosts.

    >>> [first_host(nodes) for nodes in ("gpu7", "gpu[012-014,20],cpu1", "a-[3,5]-ib")]
    ['gpu7', 'gpu012', 'a-3-ib']
    """
    match = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    assert match is not None, "it matches an empty text"
    return "".join(part or "" for part in match.groups())
