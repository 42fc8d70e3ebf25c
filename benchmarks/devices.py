"""What differs between a CPU and a GPU: how time is taken, how memory is counted and let go of, and whether a step can be recorded.

A test that has no GPU replaces the methods of `Cuda` that need one, `event` to `captured`; all else of a GPU's run then runs on a CPU.
"""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from benchmarks.timing import Clock, Timed, seconds_of

__all__ = ["CPU", "CUDA", "Cpu", "Cuda", "Device", "pick"]

CPU, CUDA = "cpu", "cuda"
GIB = 2**30
AHEAD, LEAST_AHEAD = 1.5, 1e-3  # the device sleeps for so many times what the host needs, and so many seconds more
SPUN, SPUN_AFTER = 20_000_000, 1_000_000  # cycles by which the speed of the sleeping kernel is measured, and those before
SPINS = 10  # of which the fastest counts: clocks of a GPU that had nothing to do are low, and a sleep counted by them would be too short
CAPTURE_WARM_UP = 3  # steps in a stream of their own before a graph is captured, as torch's documentation has it
# What nvidia-smi tells and torch does not. Read only.
SMI_FIELDS = ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")


class Device(Clock, Protocol):
    """Where a run is measured.

    Attributes:
        kind: CPU or CUDA: which cases and contenders it has.
        place: where tensors are made.
    """

    kind: str
    place: torch.device

    def describe(self) -> dict[str, Any]:
        """What a report says of it, to be added to `environment.describe`."""
        ...

    def free_bytes(self) -> int | None:
        """Memory that a case may take; None where nobody looks."""
        ...

    def reset_peak(self) -> None: ...

    def peak_bytes(self) -> int:
        """The most memory that tensors took since `reset_peak`; on a CPU the process, since it began."""
        ...

    def release(self) -> None:
        """Give memory back that nothing uses."""
        ...

    def failure(self) -> str | None:
        """What is wrong with it, if it can no longer be used in this process."""
        ...

    def captured(self, step: Callable[[], object]) -> Callable[[], object]:
        """A graph of the step, to be replayed."""
        ...


class Cpu:
    """Takes time on the host."""

    kind = CPU
    place = torch.device("cpu")

    def describe(self) -> dict[str, Any]:
        return {}

    def time(self, step: Callable[[], object], calls: int, *, restore: Callable[[], object] | None = None, settle: bool = False) -> Timed:
        """See `Clock`. Before a short step an untimed one brings caches and threads into its own state."""
        if restore:
            restore()
        if settle:
            step()
            if restore:
                restore()
        return Timed(seconds=seconds_of(step, calls))

    def free_bytes(self) -> int | None:
        return None

    def reset_peak(self) -> None:
        """It has one peak."""

    def peak_bytes(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB

    def release(self) -> None:
        """Torch keeps nothing."""

    def failure(self) -> str | None:
        return None

    def captured(self, step: Callable[[], object]) -> Callable[[], object]:
        raise ValueError("a CPU has no graphs")


class Cuda:
    """Takes time by events in the current stream.

    Steps are timed in a row: an untimed one comes first, and this class does not wait between it and the timed ones. So the time of a step
    is that of the device, or of the host where the host is slower. A step that itself waits for the device, as StableAdamW's does at its
    beginning for what the step before found in its gradients, is then some of the host's and then some of the device's: with a backward
    pass in between it would hardly wait. `alone` is what the device takes when the host has been ahead, as it is while a backward pass
    runs: it sleeps until the step is there. `host` is taken of that step, behind which nothing is left to be waited for.
    """

    kind = CUDA
    place = torch.device("cuda", 0)

    def __init__(self) -> None:
        self._cycles_per_second = 0.0

    def describe(self) -> dict[str, Any]:
        properties: Any = torch.cuda.get_device_properties(self.place)
        details = {
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
        return {"device": self.kind, "gpu": properties.name, "gpu_details": details | _smi()}

    # ------------------------------------------------------------------------------------------------------- what needs a GPU

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.place)

    def sleep(self, seconds: float) -> None:
        """Let the stream wait. The kernel counts cycles of a clock whose speed is not told."""
        if not self._cycles_per_second:
            torch.cuda._sleep(SPUN_AFTER)  # compiled, and awake
            self._cycles_per_second = max(self._spin() for _ in range(SPINS))
        torch.cuda._sleep(round(seconds * self._cycles_per_second))

    def _spin(self) -> float:
        """Cycles per second."""
        start, end = self.event(), self.event()
        start.record()
        torch.cuda._sleep(SPUN)
        end.record()
        end.synchronize()
        return 1e3 * SPUN / start.elapsed_time(end)

    def free_bytes(self) -> int | None:
        return torch.cuda.mem_get_info(self.place)[0]

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.place)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.place)

    def release(self) -> None:
        torch.cuda.empty_cache()

    def captured(self, step: Callable[[], object]) -> Callable[[], object]:
        """See `Device`.

        Raises:
            Exception: it cannot be captured. In torch before 2.12 the allocator then takes the capture to go on, and `empty_cache` fails:
                `graphs.probe` tries it in another process before.
        """
        before = torch.cuda.current_stream(self.place)
        stream = torch.cuda.Stream(self.place)
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            for _ in range(CAPTURE_WARM_UP):
                step()
        before.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                step()
        finally:
            torch.cuda.set_stream(before)  # which torch.cuda.graph leaves when the end of a capture fails
        return graph.replay

    # -------------------------------------------------------------------------------------------------------------------- time

    def time(self, step: Callable[[], object], calls: int, *, restore: Callable[[], object] | None = None, settle: bool = False) -> Timed:
        """See `Clock`; there is always an untimed call."""
        restore = restore or _nothing
        start, end = self.event(), self.event()
        self.synchronize()
        restore()
        step()
        restore()
        start.record()
        begin = time.perf_counter()
        for _ in range(calls):
            step()
        longest = (time.perf_counter() - begin) / calls
        end.record()
        end.synchronize()
        seconds = start.elapsed_time(end) / 1e3 / calls
        host, alone = self._ahead(step, restore, longest)
        return Timed(seconds=seconds, host=host, alone=alone)

    def _ahead(self, step: Callable[[], object], restore: Callable[[], object], longest: float) -> tuple[float, float]:
        """Seconds of the host and of the device in a step for which the host takes at most `longest`."""
        restore()
        start, end = self.event(), self.event()
        self.synchronize()
        self.sleep(AHEAD * longest + LEAST_AHEAD)
        start.record()
        begin = time.perf_counter()
        step()
        host = time.perf_counter() - begin
        end.record()
        end.synchronize()
        return host, start.elapsed_time(end) / 1e3

    def failure(self) -> str | None:
        """See `Device`: after an access out of bounds, say, every further call fails. Not for want of memory."""
        try:
            self.synchronize()
        except Exception as error:
            return f"the GPU can no longer be used in this process ({(str(error).strip() or repr(error)).splitlines()[0]})"
        return None


def _nothing() -> None:
    """Where there is nothing to restore."""


def _smi() -> dict[str, str]:
    """What nvidia-smi tells of the first GPU; nothing where it cannot be asked."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(SMI_FIELDS, (value.strip() for value in answer.split(",")), strict=False))


def pick(wanted: str | None) -> Device:
    """The GPU if there is one, or what is asked for.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if wanted == CUDA and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; leave it out to measure the CPU")
    return Cuda() if wanted != CPU and torch.cuda.is_available() else Cpu()
