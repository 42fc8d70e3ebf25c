"""What the memory gives to operations that only stream: the measure of how far a step is from its limit.

Bytes are counted as in a step, what the operation reads and what it writes. `copy_` writes lines that it has not read, which a CPU may
fetch all the same; nothing is counted for that. On a GPU the copy is the measure, from device to device, and on a CPU the fastest.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.devices import CUDA, Device
from benchmarks.records import Stream
from benchmarks.storage import KINDS, fill, pattern
from benchmarks.timing import quartiles

__all__ = ["STREAMS", "measure", "reference"]

# On a GPU a stream is over in half a millisecond, and the first ones find it asleep. Several in a row are timed together, as of one alone
# some would be the gaps at the events.
REPETITIONS, GPU_REPETITIONS = 7, 40
CALLS, GPU_CALLS = 1, 8
GPU_WARM_UP = 0.5  # seconds of copies
COPY = "y.copy_(x): 1 read, 1 write"
# (operation, tensors of fp32 that are read and written, the operation)
STREAMS: tuple[tuple[str, int, Callable[[Tensor, Tensor], Tensor]], ...] = (
    (COPY, 2, lambda x, y: y.copy_(x)),
    ("y.mul_(c): 1 read, 1 write in place", 2, lambda x, y: y.mul_(1.0)),
    ("y.add_(x): 2 reads, 1 write in place", 3, lambda x, y: y.add_(x)),
)


def measure(kind: str, numel: int, device: Device, *, when: str = "before") -> list[Stream]:
    """The best and the median of several samples of each stream, on tensors of that many elements in memory of a kind.

    Args:
        kind: a key of `storage.KINDS`.
        numel: of each of two fp32 tensors.
        device: whose memory.
        when: "before" or "after" the cases, for the report.
    """
    (x,) = KINDS[kind](((numel,),), torch.float32, device.place)
    (y,) = KINDS[kind](((numel,),), torch.float32, device.place)
    for tensor in (x, y):  # first touch, and no zeros, which some memories move faster
        fill(tensor, pattern(device.place))
    on_gpu = device.kind == CUDA
    repetitions, calls = (GPU_REPETITIONS, GPU_CALLS) if on_gpu else (REPETITIONS, CALLS)
    end = time.monotonic() + (GPU_WARM_UP if on_gpu else 0.0)
    while time.monotonic() < end:
        device.time(lambda: y.copy_(x), 1)
    found = []
    for operation, tensors, function in STREAMS:
        times = [device.time(lambda run=function: run(x, y), calls).seconds for _ in range(repetitions)]
        size = tensors * x.element_size()
        best, median = (size * numel / seconds / 1e9 for seconds in (min(times), quartiles(times)[1]))
        found.append(
            Stream(
                operation=operation,
                storage=kind,
                when=when,
                bytes_per_element=size,
                gigabytes_per_second=best,
                median_gigabytes_per_second=median,
            )
        )
    return found


def reference(streams: list[Stream], kind: str, device: str) -> float:
    """GB/s of which a step reaches a part.

    On a CPU that of the fastest stream at its best, on the same kind of memory. On a GPU that of the copy: its median, as steps are told
    by theirs, and the higher one of before and after the cases.
    """
    if device == CUDA:
        return max(stream.median_gigabytes_per_second for stream in streams if stream.operation == COPY)
    return max(stream.gigabytes_per_second for stream in streams if stream.storage == kind)
