"""Being asked to stop: a scheduler that takes the machine away sends SIGTERM, or SIGUSR1 some time before.

A signal reaches some ranks, and not at the same step. So after each step all ranks begin to tell each other whether they have one, and read
the answer a step later, when it is there: no step waits, and all ranks stop after the same one.
"""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

__all__ = ["Preemption"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Listens for signals from now on. To be made on every rank, after the process group has started."""

    def __init__(self) -> None:
        self._received = 0
        # Of its own, and on the CPU: the answer is read without waiting for a device, or for what else ranks tell each other.
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._answer = torch.zeros(1, dtype=torch.int32)
        self._asked: dist.Work | None = None
        for each in SIGNALS:
            signal.signal(each, self._receive)

    @property
    def asked_here(self) -> bool:
        """Whether this process has had a signal itself."""
        return self._received != 0

    def after_step(self) -> str | None:
        """To be called on every rank after each step.

        Returns:
            The name of the signal by which some rank was asked to stop, on every rank after the same step; else None.
        """
        if self._group is None:
            return _name(self._received)
        self.finish()
        answer = int(self._answer)
        self._answer = torch.tensor([self._received], dtype=torch.int32)
        self._asked = dist.all_reduce(self._answer, dist.ReduceOp.MAX, self._group, async_op=True)
        return _name(answer)

    def finish(self) -> None:
        """Hear the last answer, so that no rank ends while another waits for it."""
        if self._asked is not None:
            self._asked.wait()
            self._asked = None

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._received = number


def _name(number: int) -> str | None:
    return signal.Signals(number).name if number else None
