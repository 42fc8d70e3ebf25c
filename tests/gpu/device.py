"""What the tests of a GPU run on. All that a rehearsal without a GPU does differently is here.

A rehearsal has the kernels run by Triton's interpreter on the CPU, where nothing can be captured and everything is waited for: what asks
for that does nothing there, or the thinnest thing that lets a test go on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from triton_interpreter import mend

__all__ = ["BACKEND", "DEVICE", "REHEARSAL", "TRANSPORT", "busy", "capture", "environment", "is_busy", "kernels_of"]
__all__ += ["on_a_stream", "synchronisation_is_an_error", "synchronize"]

REHEARSAL = os.environ.get("GPU_CHECK_REHEARSAL") == "1"  # as `python -m tests.gpu --rehearse` sets it
DEVICE = torch.device("cpu") if REHEARSAL else torch.device("cuda", 0)
BACKEND = "triton" if REHEARSAL else "auto"  # on a GPU "auto" must take it
TRANSPORT = "gloo" if REHEARSAL else "nccl"  # of a process that is alone
NO_KERNELS = ("Memcpy", "Memset", "Optimizer.")
CYCLES = 10**9  # of a GPU that is kept busy: half a second or more


@contextmanager
def synchronisation_is_an_error() -> Iterator[None]:
    """Whatever makes the host wait for the device raises RuntimeError, as far as torch notices."""
    if REHEARSAL:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def synchronize() -> None:
    if not REHEARSAL:
        torch.cuda.synchronize()


def on_a_stream() -> AbstractContextManager[Any]:
    """Work goes to a stream that is not the default one, which waits for it at the end."""
    return nullcontext() if REHEARSAL else _on_a_stream()


@contextmanager
def _on_a_stream() -> Iterator[None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def busy() -> None:
    """Give the current stream something to do for half a second or more."""
    if not REHEARSAL:
        torch.cuda._sleep(CYCLES)


def is_busy() -> bool:
    """Whether the current stream has not done all that it was given. A rehearsal takes it for busy."""
    return REHEARSAL or not torch.cuda.current_stream().query()


def environment(*folders: Path) -> dict[str, str]:
    """Of another Python process: it imports from these folders, then from where this one does."""
    path = os.pathsep.join(filter(None, (*map(str, folders), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path}


class _Rehearsed:
    """Stands for a graph."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call

    def replay(self) -> None:
        self._call()


def capture(call: Callable[[], object]) -> Any:
    """A CUDA graph of what a call launches, which does not happen yet."""
    if REHEARSAL:
        return _Rehearsed(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def kernels_of(call: Callable[[], object]) -> list[str]:
    """Names of the kernels that a call launches, the second of two: the first profile of a process may miss some.

    None in a rehearsal, or where the profiler cannot see them.
    """
    found: list[str] = []
    for _ in range(2):
        if REHEARSAL:
            call()
            continue
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            call()
            torch.cuda.synchronize()
        found = [event.name for event in recorded.events() or () if _is_kernel(event)]
    return found


def _is_kernel(event: Any) -> bool:
    """Annotations, as torch's optimizers make, are shown on the device too."""
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation and not event.name.startswith(NO_KERNELS)


if REHEARSAL and find_spec("triton") is not None:  # in every process, ranks included
    mend()
