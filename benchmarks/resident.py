"""How much memory a process needs: what it has in memory (resident), from Linux."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

__all__ = ["peak", "resident_after_reset"]

PEAK, RESIDENT = "VmHWM", "VmRSS"  # in /proc/self/status, in KiB


def resident_after_reset() -> int:
    """Bytes of this process in memory, from which its peak begins anew where that can be had."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak()
    resident = _status(RESIDENT)
    return peak() if resident is None else resident


def peak() -> int:
    """The most bytes that this process had in memory."""
    most = _status(PEAK)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if most is None else most


def _status(key: str) -> int | None:
    """Bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
