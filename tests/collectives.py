"""What ranks communicate, under whatever API, as torch's profiler sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.profiler import ProfilerActivity, profile


@contextmanager
def collectives() -> Iterator[list[str]]:
    """The list has the names of what gloo communicates, in order, afterwards.

    They are looked for among the profiler's raw events: to make its own ones of all operations takes it up to a second.
    """
    found: list[str] = []
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        yield found
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name().startswith("gloo:")]
    found.extend(event.name() for event in sorted(events, key=lambda event: event.start_ns()))


def collectives_of(call: Callable[[], object]) -> list[str]:
    with collectives() as found:
        call()
    return found
