"""Stop all ranks after the same step when a scheduler takes a machine away, and sends SIGTERM, or SIGUSR1 some time before.

A signal reaches only some ranks, and at different steps. So after each step except the last, all ranks start an all-reduce of the signals
that they have received, and read its result one step later, when it is complete: no step waits for it.
"""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

__all__ = ["Preemption"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Handle signals to stop. Construct it on every rank, after the process group has started."""

    def __init__(self) -> None:
        self.received = 0  # the number of the last signal to this process; 0 before the first
        # A group of its own, on the CPU: its all-reduce waits neither for a device nor for other collectives.
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._reduced = torch.zeros(1, dtype=torch.int32)
        self._all_reduce: dist.Work | None = None
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def after_step(self) -> str | None:
        """Exchange received signals. Call it on every rank after each step except the last.

        Returns:
            The name of a signal that any rank has received, on every rank after the same step; None if there is none.
        """
        if self._group is None:
            return _name(self.received)
        self.finish()
        number = int(self._reduced)
        self._reduced = torch.tensor([self.received], dtype=torch.int32)
        self._all_reduce = dist.all_reduce(self._reduced, dist.ReduceOp.MAX, self._group, async_op=True)
        return _name(number)

    def finish(self) -> None:
        """Wait for the last all-reduce, so that no rank ends while another waits in it."""
        if self._all_reduce is not None:
            self._all_reduce.wait()
            self._all_reduce = None

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = number


def _name(number: int) -> str | None:
    return signal.Signals(number).name if number else None
