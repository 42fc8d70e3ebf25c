"""Track nested backward passes: which ones run, and whether an exception has ended one.

A reentrant checkpoint runs a backward pass inside the model's. Autograd gives the number of the innermost running pass, but neither the
number of the pass around it nor whether an exception has ended one. Used by `reduction.py`. Tried with torch 2.11 and 2.13.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from weakref import WeakMethod

import torch
from torch.autograd import Variable
from torch.autograd.function import BackwardCFunction

__all__ = ["Passes"]


class Passes:
    """Tracks the backward passes in which `enter` is called, and the passes around them.

    Args:
        ended: a method that is called at the end of each outermost pass, if its object still exists. The pass is still running then, so
            that `backward` raises the method's exceptions.

    Attributes:
        was_left: whether an exception has ended a tracked pass.
    """

    def __init__(self, ended: WeakMethod[Callable[[], None]]) -> None:
        self.was_left = False
        self._ended = ended
        self._running: set[int] = set()
        self._current = -1

    @property
    def is_any_running(self) -> bool:
        return bool(self._running)

    def enter(self) -> None:
        """Track the running pass. To be called from a hook in it."""
        number = torch._C._current_graph_task_id()
        if number == self._current:
            return
        self._current = number
        if number not in self._running:
            self._running.add(number)
            Variable._execution_engine.queue_callback(_Pass(self, number))

    def end(self, number: int) -> None:
        """Record that a pass has ended without an exception."""
        self._running.discard(number)
        ended = self._ended()
        if ended is not None and not self._running and not _is_inside_another():
            ended()

    def leave(self, number: int) -> None:
        """Record that an exception has ended a pass."""
        self._running.discard(number)
        self.was_left = True


class _Pass:
    """A callback at the end of one pass. Only autograd refers to it, so it is freed with the pass, also if an exception ends the pass."""

    def __init__(self, passes: Passes, number: int) -> None:
        self._passes = passes
        self._number = number
        self._has_ended = False

    def __call__(self) -> None:
        self._has_ended = True
        self._passes.end(self._number)

    def __del__(self) -> None:
        if not self._has_ended:
            self._passes.leave(self._number)
        if torch._C._current_graph_task_id() >= 0:  # the outer pass continues
            self._passes.enter()


def _is_inside_another() -> bool:
    """Return whether the running pass was started by the backward of a function."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is BackwardCFunction.apply.__code__:
            return True
        frame = frame.f_back
    return False
