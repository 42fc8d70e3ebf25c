"""What the operating system and a container let a process have: shared memory, memory, open files, cores."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from sharded_optim.tools.doctor.findings import Finding, Status
from sharded_optim.tools.doctor.place import Place

__all__ = ["examine"]

SHARED_MEMORY = "/dev/shm"
LEAST_SHARED = 64 * 2**20  # bytes; Docker's default, which data loaders' workers and NCCL fill
LEAST_MEMORY = 2**30  # bytes
LEAST_FILES = 1024  # a rank has sockets to the others, pipes to workers, and files of data
CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
LIMITS = {  # of a control group's memory: the files of its limit and of what it uses, by version
    "": ("memory.max", "memory.current"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}
MEMORY = Path("/proc/meminfo")


def examine(place: Place) -> list[Finding]:
    return [_shared_memory(), _memory(), _open_files(), _threads(place)]


def _finding(name: str, status: Status, value: str, way_out: str | None = None, **data: int | str | None) -> Finding:
    return Finding(section="limits", name=name, status=status, value=value, way_out=way_out, data=data)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size < 10 * 2**30 else f"{size / 2**30:,.0f} GiB"


# -------------------------------------------------------------------------------------------------------------------------- memory


def _shared_memory() -> Finding:
    try:
        system = os.statvfs(SHARED_MEMORY)
    except (OSError, AttributeError):
        return _finding("shared memory", "absent", f"no {SHARED_MEMORY}")
    total, free = system.f_blocks * system.f_frsize, system.f_bavail * system.f_frsize
    value = f"{_mib(free)} of {_mib(total)} free in {SHARED_MEMORY}"
    if total <= LEAST_SHARED:
        return _finding("shared memory", "warning", value, "docker run --shm-size 8g, or --ipc host", total=total, free=free)
    if free < LEAST_SHARED:
        way_out = f"remove what ended jobs have left in {SHARED_MEMORY}, or docker run with a larger --shm-size"
        return _finding("shared memory", "warning", value, way_out, total=total, free=free)
    return _finding("shared memory", "ok", value, total=total, free=free)


def _memory() -> Finding:
    try:
        lines = dict(line.split(":") for line in MEMORY.read_text().splitlines())
        total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return _finding("memory", "absent", f"not told by {MEMORY}")
    limit = None
    for most, used in _memory_limits():
        if most < total:  # what is not limited has a limit beyond all memory
            limit = most if limit is None else min(limit, most)
            free = min(free, max(0, most - used))
    value = f"{_mib(free)} of {_mib(limit or total)} free" + (", the limit of the control group" if limit else "")
    data = {"total": total, "limit": limit, "free": free}
    if free < LEAST_MEMORY:
        return _finding("memory", "warning", value, "end other processes, or give the container more (docker run --memory)", **data)
    return _finding("memory", "ok", value, **data)


def _memory_limits() -> list[tuple[int, int]]:
    """Limit and use of this process's control group and of those that it is in."""
    found = []
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in LIMITS:
            continue
        inside = Path(path.lstrip("/"))
        for group in (inside, *inside.parents):  # a container sees its own group as the root, whatever the path says
            files = [CONTROL_GROUPS / controllers / group / name for name in LIMITS[controllers]]
            try:
                limit, used = (file.read_text().strip() for file in files)
            except OSError:
                continue
            if limit != "max":
                found.append((int(limit), int(used)))
    return found


# ------------------------------------------------------------------------------------------------------------------ files and cores


def _open_files() -> Finding:
    try:
        import resource
    except ImportError:  # not Unix
        return _finding("open files", "absent", "not limited by ulimit")
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _finding("open files", "ok", "unlimited", limit=None)
    if limit < LEAST_FILES:
        able = "ulimit -n 65536" if most == resource.RLIM_INFINITY or most >= 65536 else f"ulimit -n {most}, the hard limit"
        return _finding("open files", "warning", f"at most {limit:,}", f"{able}, or docker run --ulimit nofile=65536", limit=limit)
    return _finding("open files", "ok", f"at most {limit:,}", limit=limit)


def _threads(place: Place) -> Finding:
    """Ranks with other numbers of threads would take other times; more threads than cores make all of them slow."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, chosen = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    told = f"OMP_NUM_THREADS={chosen}" if chosen is not None else "OMP_NUM_THREADS is not set"
    value = f"torch uses {threads} on {cores} core{'' if cores == 1 else 's'}; {told}"
    data = {"cores": cores, "threads": threads, "omp_num_threads": chosen, "local_world_size": place.local_world_size}
    alike = f"{threads} ({told})"
    share = max(1, cores // place.local_world_size)
    way_out = None
    if threads > share:
        way_out = f"set OMP_NUM_THREADS={share}" + (f" for {place.local_world_size} ranks" if place.local_world_size > 1 else "")
    status: Status = "warning" if way_out else "ok"
    return Finding(section="limits", name="threads", status=status, value=value, way_out=way_out, data=data, alike=alike)
