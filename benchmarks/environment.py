"""Where a measurement was taken."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sharded_optim.version import __version__

__all__ = ["describe", "summary"]

PACKAGES = ("torch", "torch-optimi", "deepspeed", "llvmlite", "numpy", "triton")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def describe(device: torch.device, module: str) -> dict[str, Any]:
    """Machine, versions, date and command.

    Args:
        device: what is measured.
        module: name of the benchmark's module, for the command.
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "commit": _commit(),
        "device": device.type,
        "gpu": None,  # `devices.Cuda.describe` has it
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # of others, if this has only begun
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "transparent_huge_pages": HUGE_PAGES.read_text().strip() if HUGE_PAGES.exists() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {"sharded-optim": __version__} | {name: _version(name) for name in PACKAGES},
    }


def summary(environment: dict[str, Any]) -> str:
    """One line for a report."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    details = environment.get("gpu_details", {})
    place = f"{environment['cpu']} ({environment['vector_instructions']}), {environment['threads']} threads"
    if environment["gpu"]:
        place = f"{environment['gpu']} in a machine with {environment['cores']} cores, CUDA {details.get('cuda')}"
        place += f", driver {details['driver_version']}" if "driver_version" in details else ""
    return f"{environment['date'][:10]}, {place}, {environment['system']}, Python {environment['python']}, {versions}."


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # has the build, which the metadata of some of its wheels leave out
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    """Its name, which in a virtual machine may be no more than its maker's, and the numbers of its family and model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = {name.strip(): value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon}
    numbers = [f"{name} {found[key]}" for name, key in (("family", "cpu family"), ("model", "model")) if key in found]
    return ", ".join([found.get("model name", platform.processor()), *numbers])


def _commit() -> str | None:
    """The commit of this repository, with a + if files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
