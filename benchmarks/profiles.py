"""What a step does: its kernels and the gaps between them, by torch's profiler, and the host's functions, by Python's.

Taken after everything was timed, as profilers leave traces in a process.
"""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from benchmarks.devices import CUDA, Device
from benchmarks.records import Profile, Share

__all__ = ["Interval", "kernels_of", "profile", "span_and_gaps"]

Interval = tuple[str, float, float]  # name, begin and end in microseconds
NAME = 100  # characters
HOST_STEPS = 10  # over which the host's functions are counted
FUNCTIONS = 12  # that are told


def profile(case: str, contender: str, step: Callable[[], object], device: Device) -> Profile:
    """Look at a step that has warmed up."""
    try:
        events = _device_events(step, device)
        kernels = kernels_of(events)
        span, gaps = span_and_gaps(events)
        return Profile(
            case=case,
            contender=contender,
            kernels=kernels,
            kernels_milliseconds=sum(kernel.microseconds for kernel in kernels) / 1e3,
            span_milliseconds=span / 1e3,
            gaps_milliseconds=gaps / 1e3,
            functions=_functions(step),
        )
    except Exception as error:  # a profiler that cannot be had is no reason to lose what was measured
        return Profile(case=case, contender=contender, failure=f"{type(error).__name__}: {error}"[:300])


def _device_events(step: Callable[[], object], device: Device) -> list[Interval]:
    """What ran on the device in a step. The first profile of a process may miss some, so it is thrown away."""
    if device.kind != CUDA or not torch.cuda.is_available():
        return []
    found: list[Interval] = []
    for _ in range(2):
        torch.cuda.synchronize(device.place)
        with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize(device.place)
        found = [(event.name, event.time_range.start, event.time_range.end) for event in profiler.events() or () if _is_kernel(event)]
    return found


def _is_kernel(event: Any) -> bool:
    """Whether it ran on the device: annotations, as torch's optimizers make, are shown there too and last as long as what is in them."""
    return event.device_type.name == "CUDA" and not event.is_user_annotation and not event.name.startswith("Optimizer.")


def kernels_of(events: Iterable[Interval]) -> list[Share]:
    """By name, the longest first."""
    found: dict[str, tuple[int, float]] = {}
    for name, begin, end in events:
        count, microseconds = found.get(name, (0, 0.0))
        found[name] = count + 1, microseconds + end - begin
    shares = [Share(name=name[:NAME], count=count, microseconds=microseconds) for name, (count, microseconds) in found.items()]
    return sorted(shares, key=lambda share: -share.microseconds)


def span_and_gaps(events: Sequence[Interval]) -> tuple[float, float]:
    """(microseconds from the first to the last, those of them in which nothing ran)."""
    if not events:
        return 0.0, 0.0
    ordered = sorted(events, key=lambda event: event[1])
    gaps, last = 0.0, ordered[0][2]
    for _, begin, end in ordered:
        gaps += max(0.0, begin - last)
        last = max(last, end)
    return last - ordered[0][1], gaps


def _functions(step: Callable[[], object]) -> list[Share]:
    """The host's functions by the time in each, without what it called, per step."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(HOST_STEPS):
        step()
    profiler.disable()
    statistics: dict[tuple[str, int, str], Any] = vars(pstats.Stats(profiler))["stats"]
    shares = [
        Share(name=_called(*function), count=calls / HOST_STEPS, microseconds=1e6 * own / HOST_STEPS)
        for function, (_, calls, own, *_) in statistics.items()
    ]
    return sorted(shares, key=lambda share: -share.microseconds)[:FUNCTIONS]


def _called(path: str, line: int, name: str) -> str:
    """A function without the machine's folders."""
    return name[:NAME] if path == "~" else f"{'/'.join(Path(path).parts[-2:])}:{line} {name}"[:NAME]
