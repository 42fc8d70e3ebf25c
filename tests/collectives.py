"""What ranks communicate, under whatever API, as torch's profiler sees it; and as if they ran on several machines."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from sharded_optim.zero import shared_memory


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


@contextmanager
def ranks_per_machine(count: int) -> Iterator[None]:
    """As if so many ranks shared a machine, in whose memory they read each other's buffers; others send them."""
    with tempfile.TemporaryDirectory() as folder:
        boot_id = Path(folder) / "boot_id"
        boot_id.write_text(str(dist.get_rank() // count))
        before, shared_memory.BOOT_ID = shared_memory.BOOT_ID, boot_id
        try:
            yield
        finally:
            shared_memory.BOOT_ID = before
