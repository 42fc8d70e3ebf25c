"""Bandwidth of memory: the rate at which a buffer far larger than any cache is copied, reads and writes counted."""

from __future__ import annotations

import time

import torch

from sharded_optim.tools.doctor.findings import Finding, one_line

__all__ = ["examine"]

SIZES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}  # bytes of the buffer; an H200 caches 50 MiB, a large server CPU 384 in several dies
REPETITIONS = 5


def examine(device: torch.device) -> list[Finding]:
    """The memory of the CPU, and that of the device."""
    return [_examine(each) for each in dict.fromkeys((torch.device("cpu"), device))]


def _examine(device: torch.device) -> Finding:
    name = "memory" if device.type == "cpu" else "gpu memory"
    size = SIZES[device.type]
    try:
        seconds = _copy_seconds(device, size)
    except RuntimeError as error:  # out of memory
        way_out = "end other processes that hold memory"
        return Finding(section="bandwidth", name=name, status="warning", value=f"not measured: {one_line(error)}", way_out=way_out)
    rate = 2 * size / seconds
    count = torch.get_num_threads()
    threads = f" by {count} thread{'' if count == 1 else 's'}" if device.type == "cpu" else ""
    value = f"{rate / 1e9:,.1f} GB/s read and written, copying {size // 2**20} MiB{threads}"
    return Finding(section="bandwidth", name=name, status="ok", value=value, data={"bytes_per_second": rate, "buffer": size})


def _copy_seconds(device: torch.device, size: int) -> float:
    """The best of a few; the first copy, which also gets the pages, does not count."""
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    times = []
    for _ in range(1 + REPETITIONS):
        _wait(device)
        begin = time.perf_counter()
        target.copy_(source)
        _wait(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
