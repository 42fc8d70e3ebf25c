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

__all__ = ["describe", "pick_device", "summary"]

PACKAGES = ("sharded-optim", "torch", "torch-optimi", "deepspeed", "numba", "numpy", "triton")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def pick_device(wanted: str | None) -> torch.device:
    """The GPU if there is one, or what is asked for.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; leave it out to measure the CPU")
    return torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))


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
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # of others, if this has only begun
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "transparent_huge_pages": HUGE_PAGES.read_text().strip() if HUGE_PAGES.exists() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def summary(environment: dict[str, Any]) -> str:
    """One line for a report."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    place = environment["gpu"] or f"{environment['cpu']} ({environment['vector_instructions']}), {environment['threads']} threads"
    return f"{environment['date'][:10]}, {place}, {environment['system']}, Python {environment['python']}, {versions}."


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _commit() -> str | None:
    """The commit of this repository, with a + if files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
