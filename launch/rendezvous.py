"""Rendezvous: the ranks of one attempt find each other through a store, under a prefix that no other attempt uses.

torchrun keeps one store for all attempts of a job, in which a restarted rank would read keys of an earlier attempt. Numbers do not
distinguish attempts, as every node counts its own. So rank 0 draws a random name for the attempt, and a process has joined it once rank 0
has published the token that the process has written:

    rank 0:  attempt = NAME                        ... waits for all NAME/token/RANK ...  NAME/tokens = all of them
    others:  read attempt, NAME/token/RANK = TOKEN ... wait until NAME/tokens has TOKEN, or for another attempt ...
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from launch.errors import ConfigError
from launch.launchers import MPICH, OPEN_MPI, SRUN, RankInfo, first_host
from sharded_optim.sharding.ranks import named_ranks

__all__ = ["RendezvousError", "RendezvousStore", "join_attempt", "open_store", "store_at_address", "store_through_mpi"]

# srun assigns no port. It is chosen by the job's number, so that jobs on one node rarely share it, among ports that systems do not assign.
SLURM_PORTS = range(10000, 30000)
ROOT = Path(__file__).parents[1]
LONGEST_PAUSE = 0.5  # seconds between two reads of the store


class RendezvousError(RuntimeError):
    """Not all ranks joined; the message names those that did not."""


@dataclass(frozen=True, kw_only=True)
class RendezvousStore:
    """A store that all ranks can reach.

    Attributes:
        store: torch's client of the store.
        server: the server process, if this process has started it; else None.
    """

    store: Store
    server: subprocess.Popen[str] | None = None

    def close(self) -> None:
        """Stop the server. To be called once no rank uses the store any more."""
        if self.server is not None:
            self.server.terminate()
            self.server.wait()


# ------------------------------------------------------------------------------------------------------------------------ stores


def store_at_address(address: str, port: int, info: RankInfo, timeout: timedelta, *, is_served: bool = False) -> RendezvousStore:
    """Connect to a store at an address that all ranks know.

    Args:
        address: the address of the machine that serves the store.
        port: the port on that machine; 0, on rank 0 only: any free port.
        info: the rank of this process.
        timeout: the timeout of a connection.
        is_served: whether the launcher serves the store; else rank 0 starts a server, and `address` must be that of rank 0's machine.
    """
    server = None
    if info.rank == 0 and not is_served:
        server, port = _serve(port)
    try:
        return RendezvousStore(store=TCPStore(address, port, info.world_size, False, timeout, wait_for_workers=False), server=server)
    except (dist.DistError, RuntimeError) as error:
        raise RendezvousError(f"rank {info.rank} cannot reach the rendezvous store at {address}:{port}: {error}") from error


def _serve(port: int) -> tuple[subprocess.Popen[str], int]:
    """Start a process that serves a store for as long as this process runs; return it and its port."""
    command = [sys.executable, "-m", "launch.store_server", str(port), str(os.getpid())]
    # In a session of its own, so that signals to the ranks do not reach it, and without inherited pipes, which mpirun would wait for.
    server = subprocess.Popen(command, cwd=ROOT, stdin=DEVNULL, stdout=subprocess.PIPE, stderr=DEVNULL, text=True, start_new_session=True)
    assert server.stdout is not None
    with server.stdout as output:
        line = output.readline().strip()
    if not line.isdigit():
        raise RendezvousError(f"rank 0 cannot open a rendezvous store at port {port}: {line or f'exit status {server.wait()}'}")
    return server, int(line)


def store_through_mpi(info: RankInfo, address: str, timeout: timedelta) -> RendezvousStore:
    """Connect to a store that rank 0 serves. Rank 0 broadcasts its address through MPI (`mpi_broadcast.py`), used for nothing else.

    Args:
        info: the rank of this process.
        address: the address of rank 0's machine; "": its host name, or the loopback address if all ranks are on one machine.
        timeout: the timeout of the broadcast, and of a connection.

    Raises:
        ConfigError: mpi4py is not installed, or has loaded another MPI library than mpirun's.
        RendezvousError: MPI has failed, or not all ranks joined.
    """
    if find_spec("mpi4py") is None:
        raise ConfigError("mpirun needs mpi4py, which is not installed; run pip install mpi4py, or start with torchrun")
    opened = store_at_address(address or "127.0.0.1", 0, info, timeout) if info.rank == 0 else None
    server = _broadcast(0 if opened is None else opened.store.port, address, timeout)  # pyright: ignore[reportAttributeAccessIssue]
    if server["world_size"] != info.world_size:
        raise ConfigError(
            f"mpirun has started {info.world_size} processes, but the MPI library that mpi4py has loaded ({server['library']}) counts "
            f"{server['world_size']}; set MPI4PY_LIBMPI to the libmpi of this mpirun"
        )
    return opened or store_at_address(server["address"], server["port"], info, timeout, is_served=True)


def _broadcast(port: int, address: str, timeout: timedelta) -> dict[str, Any]:
    """Broadcast the address and port of rank 0's store through MPI; see `mpi_broadcast.py` for the keys of the result."""
    library = _library_of_launcher()
    environment = os.environ | ({} if library is None else {"MPI4PY_LIBMPI": os.environ.get("MPI4PY_LIBMPI", str(library))})
    command = [sys.executable, "-m", "launch.mpi_broadcast", str(port), *filter(None, [address])]
    seconds = timeout.total_seconds()
    try:  # close_fds=False: a rank's connection to mpirun is an open file, which the child inherits
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, close_fds=False, check=False
        )
    except subprocess.TimeoutExpired:
        raise RendezvousError(f"the rendezvous through MPI took longer than {seconds:.0f} s; see the logs of the other ranks") from None
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise RendezvousError(f"the rendezvous through MPI failed (exit status {done.returncode}):\n{done.stderr[-2000:]}") from None


def _library_of_launcher() -> Path | None:
    """Find the MPI library of the mpirun that has started this process, as several may be installed; None if it is not found."""
    process = os.getppid()
    for _ in range(4):  # mpirun, its daemon, a shell in between
        try:
            program = Path(os.readlink(f"/proc/{process}/exe"))
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            return None
        if program.name.startswith(("prte", "orte", "mpi", "hydra")):
            names = (f"{folder}/{name}" for name in ("libmpi.so.40", "libmpi.so.12", "libmpi.so") for folder in ("lib", "lib64"))
            for library in map(program.parent.parent.joinpath, names):
                if library.exists():
                    return library
    return None


def open_store(info: RankInfo, timeout: timedelta) -> RendezvousStore:
    """Open the store of the launcher, or one that rank 0 serves."""
    if info.world_size == 1:  # needs no address, and the environment may have none
        return RendezvousStore(store=HashStore())
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if info.launcher in (OPEN_MPI, MPICH):
        return store_through_mpi(info, address, timeout)
    if info.launcher is SRUN:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "localhost")
        job = int(os.environ.get("SLURM_JOB_ID", "0"))
        address, port = address or first_host(nodes), port or SLURM_PORTS[job % len(SLURM_PORTS)]
    missing = [name for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if not value]
    if missing:
        raise ConfigError(f"{', '.join(missing)} not in the environment; start with torchrun, mpirun or srun")
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return store_at_address(address, int(port), info, timeout, is_served=is_served)


# ---------------------------------------------------------------------------------------------------------------------- attempts


def join_attempt(store: Store, info: RankInfo, timeout: timedelta) -> Store:
    """Wait until all ranks have joined this attempt.

    Args:
        store: the store of the job.
        info: the rank of this process.
        timeout: the time within which all ranks must join.

    Returns:
        A store with the keys of this attempt alone.

    Raises:
        RendezvousError: not all joined in time.
    """
    if info.rank == 0:
        return _begin_attempt(store, info.world_size, timeout)
    own, joined = uuid.uuid4().hex, ""
    for _ in _polls(timeout):
        if info.launcher_pid not in (None, os.getppid()):  # this attempt is over too, and its ranks must not join the next one
            raise RendezvousError(f"the launcher of rank {info.rank} (pid {info.launcher_pid}) has ended before all ranks joined")
        if store.check(["attempt"]):
            name = store.get("attempt").decode()
            prefixed = PrefixStore(name, store)
            if name != joined:
                prefixed.set(f"token/{info.rank}", own)
                joined = name
            if prefixed.check(["tokens"]) and own in json.loads(prefixed.get("tokens")):
                return prefixed
    raise RendezvousError(f"rank {info.rank} could not join rank 0 within {timeout.total_seconds():.0f} s; see the log of rank 0")


def _begin_attempt(store: Store, world_size: int, timeout: timedelta) -> Store:
    """Publish the name of a new attempt on rank 0, and wait for the tokens of all other ranks."""
    name = f"attempt-{uuid.uuid4().hex}"
    prefixed = PrefixStore(name, store)
    store.set("attempt", name)
    others = awaited = range(1, world_size)
    for _ in _polls(timeout):
        awaited = [rank for rank in awaited if not prefixed.check([f"token/{rank}"])]
        if not awaited:
            prefixed.set("tokens", json.dumps([prefixed.get(f"token/{rank}").decode() for rank in others]))
            return prefixed
    raise RendezvousError(
        f"{named_ranks(awaited)} of {world_size} did not join within {timeout.total_seconds():.0f} s; "
        f"see their logs, and check that they can reach this machine"
    )


def _polls(timeout: timedelta) -> Iterator[None]:
    """Yield at growing intervals until the timeout, and once more after it."""
    until, pause = time.monotonic() + timeout.total_seconds(), 0.005
    while time.monotonic() < until:
        yield
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    yield
