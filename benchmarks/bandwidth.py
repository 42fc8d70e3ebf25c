"""What the memory gives to operations that only stream: the measure of how far a step is from its limit.

Bytes are counted as in a step, what the operation reads and what it writes. `copy_` writes lines that it has not read, which a CPU may
fetch all the same; nothing is counted for that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.records import Stream
from benchmarks.storage import KINDS
from benchmarks.timing import seconds_of

__all__ = ["STREAMS", "fastest", "measure"]

REPETITIONS = 7
# (operation, tensors of fp32 that are read and written, the operation)
STREAMS: tuple[tuple[str, int, Callable[[Tensor, Tensor], Tensor]], ...] = (
    ("y.copy_(x): 1 read, 1 write", 2, lambda x, y: y.copy_(x)),
    ("y.mul_(c): 1 read, 1 write in place", 2, lambda x, y: y.mul_(1.0)),
    ("y.add_(x): 2 reads, 1 write in place", 3, lambda x, y: y.add_(x)),
)


def measure(kind: str, numel: int, device: torch.device) -> list[Stream]:
    """The best of several runs of each stream, on tensors of that many elements in memory of a kind."""
    (x,) = KINDS[kind](((numel,),), torch.float32, device)
    (y,) = KINDS[kind](((numel,),), torch.float32, device)
    x.zero_()  # first touch
    y.zero_()
    found = []
    for operation, tensors, function in STREAMS:
        seconds = min(seconds_of(lambda run=function: run(x, y), 1, device) for _ in range(REPETITIONS))
        size = tensors * x.element_size()
        rate = size * numel / seconds / 1e9
        found.append(Stream(operation=operation, storage=kind, bytes_per_element=size, gigabytes_per_second=rate))
    return found


def fastest(streams: list[Stream], kind: str) -> float:
    """GB/s of the fastest stream on a kind of memory."""
    return max(stream.gigabytes_per_second for stream in streams if stream.storage == kind)
