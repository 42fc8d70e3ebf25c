"""Check packages, device and threads of this process: old versions, and values that ranks must have in common. Imports no optional package.

Hardware, drivers, limits and libraries are in torch's own report: `python -m torch.utils.collect_env`.
"""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from importlib.util import find_spec

import torch

from sharded_optim.deepspeed import NEXT, OLDEST, VERSIONS
from sharded_optim.tools.doctor.findings import Finding, Status
from sharded_optim.tools.doctor.rank_info import RankInfo
from sharded_optim.version import __version__

__all__ = ["MINIMUM", "OPTIONAL", "device_of", "examine"]

MINIMUM = {"torch": (2, 9), "llvmlite": (0, 45), "triton": (3, 6), "safetensors": (0, 4, 3)}  # as in pyproject.toml
# Optional packages, and the argument of `pip install` for each.
OPTIONAL = {
    "llvmlite": "llvmlite",
    "triton": "triton",
    "deepspeed": f"'deepspeed{VERSIONS}'",
    "mpi4py": "mpi4py",
    "safetensors": "safetensors",
    "fsspec": "fsspec",
}


def device_of(info: RankInfo) -> torch.device:
    """Return the device on which this rank would train."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.device("cuda", info.local_rank % count) if count else torch.device("cpu")


def examine(info: RankInfo) -> list[Finding]:
    """Check versions, the device and the number of threads."""
    python = platform.python_version()
    return [
        _finding("python", "ok", python, alike=python),
        _package("torch"),
        _package("numpy"),
        _finding("sharded-optim", "ok", __version__, alike=__version__),
        *map(_package, OPTIONAL),
        _device(device_of(info)),
        _threads(info),
    ]


def _finding(name: str, status: Status, value: str, way_out: str | None = None, *, alike: str) -> Finding:
    return Finding(section="environment", name=name, status=status, value=value, way_out=way_out, data={"value": alike}, alike=alike)


def _version_of(name: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown" if find_spec(name) is not None else None


def numbers_of(version: str) -> tuple[int, ...]:
    """Return the numbers at the beginning of a version.

    >>> numbers_of("2.13.0rc1+cpu")
    (2, 13, 0)
    """
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _package(name: str) -> Finding:
    version = str(torch.__version__) if name == "torch" else _version_of(name)
    if version is None and name == "numpy":
        return _finding(name, "problem", "not installed; torch.distributed needs it", "pip install numpy", alike="none")
    if version is None:
        return _finding(name, "absent", "not installed", f"pip install {OPTIONAL[name]}", alike="none")
    oldest = ".".join(map(str, MINIMUM.get(name, ())))
    if oldest and version != "unknown" and numbers_of(version) < MINIMUM[name]:
        status = "problem" if name == "torch" else "warning"
        return _finding(name, status, f"{version}, and >= {oldest} is needed", f"pip install '{name}>={oldest}'", alike=version)
    if name == "deepspeed" and not OLDEST <= numbers_of(version)[:2] < NEXT:
        install = f"pip install {OPTIONAL[name]}"
        return _finding(name, "warning", f"{version}; so.deepspeed attaches to {VERSIONS}", install, alike=version)
    return _finding(name, "ok", f"{version}, >= {oldest}" if name == "torch" else version, alike=version)


def _device(device: torch.device) -> Finding:
    if device.type != "cuda":
        return _finding("device", "ok", "cpu", alike="cpu")
    name = torch.cuda.get_device_name(device)
    try:
        right = bool((torch.ones(1000, device=device) * 2).sum().item() == 2000)
    except RuntimeError as error:
        return _finding("device", "problem", f"{name} fails: {error}", "see python -m torch.utils.collect_env", alike=name)
    if not right:
        return _finding("device", "problem", f"{name} computes wrong results", "do not use this GPU", alike=name)
    return _finding("device", "ok", f"{torch.cuda.device_count()} x {name}", alike=name)


def _threads(info: RankInfo) -> Finding:
    """Check that torch does not use more threads than cores, which makes all ranks slow."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, chosen = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    setting = f"OMP_NUM_THREADS={chosen}" if chosen is not None else "OMP_NUM_THREADS is not set"
    value, alike = f"torch uses {threads} on {cores} core{'' if cores == 1 else 's'}; {setting}", f"{threads} ({setting})"
    share = max(1, cores // info.local_world_size)
    if threads <= share:
        return _finding("threads", "ok", value, alike=alike)
    ranks = f" for {info.local_world_size} ranks" if info.local_world_size > 1 else ""
    return _finding("threads", "warning", value, f"set OMP_NUM_THREADS={share}{ranks}", alike=alike)
