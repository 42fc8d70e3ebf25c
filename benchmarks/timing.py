"""How a step is timed: contenders take turns in rounds, in a new order each, so that what slows the machine for a while slows all.

What takes the time of a step is a `Clock`; `devices.py` has those of a CPU and of a GPU.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Clock", "Entrant", "Timed", "interleave", "keep_threads", "quartiles", "seconds_of", "without_collector"]

SHORTEST = 2e-3  # seconds of a sample: shorter steps are repeated
SHORT = 20e-3  # seconds of a step before which an untimed one brings caches and threads into its own state
SLOW = 2.5  # what takes up to n times so much as the baseline runs in every nth round
LEAST_ROUNDS, MOST_ROUNDS, LEAST_SAMPLES = 7, 300, 3


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What a step takes, in seconds.

    Attributes:
        seconds: one of several in a row, their mean, with waiting for the host where the device does.
        alone: of the device, when the host has all of the step ready before it begins; None where host and device are one.
        host: of the host inside that step; None likewise.
    """

    seconds: float
    host: float | None = None
    alone: float | None = None


class Clock(Protocol):
    """Takes the time of steps."""

    def time(
        self,
        step: Callable[[], object],
        calls: int,
        *,
        restore: Callable[[], object] | None = None,  # untimed, before the first call; with it there is one call
        settle: bool = False,  # whether an untimed call comes first
    ) -> Timed: ...


@dataclass(kw_only=True)
class Entrant:
    """What is timed, and its samples."""

    name: str
    step: Callable[[], object]
    warm: float  # seconds of a step, when it warmed up
    restore: Callable[[], object] | None = None  # untimed, before each step; what it spoils
    samples: dict[int, float] = field(default_factory=dict)  # seconds of a step, by round
    of_host: list[float] = field(default_factory=list)  # seconds of the host in a step, where it is not the device
    alone: list[float] = field(default_factory=list)  # seconds of the device for a step that the host had ready
    failure: Exception | None = None  # after which it was not timed any more

    @property
    def seconds(self) -> float:
        """What a step takes at best: others may have disturbed the first."""
        return min(self.warm, *self.samples.values()) if self.samples else self.warm

    @property
    def calls(self) -> int:
        """How often it steps in a sample."""
        return 1 if self.restore else max(1, math.ceil(SHORTEST / max(self.seconds, 1e-7)))

    def sample(self, number: int, clock: Clock) -> None:
        """Take the sample of a round."""
        timed = clock.time(self.step, self.calls, restore=self.restore, settle=self.seconds < SHORT)
        self.samples[number] = timed.seconds
        self.of_host += [] if timed.host is None else [timed.host]
        self.alone += [] if timed.alone is None else [timed.alone]


def seconds_of(step: Callable[[], object], calls: int = 1) -> float:
    """Seconds of a step on the host, mean over `calls`."""
    begin = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - begin) / calls


def interleave(entrants: Sequence[Entrant], baseline: str, deadline: float, clock: Clock, *, least_rounds: int = LEAST_ROUNDS) -> None:
    """Add samples to all entrants until `deadline`, of `time.monotonic`, and at least `least_rounds` rounds.

    Who raises is timed no more, and keeps what it raised; without the baseline nobody is.
    """
    reference = next(entrant for entrant in entrants if entrant.name == baseline)
    generator = random.Random(0)
    with without_collector():
        for number in count():
            if number >= least_rounds and (time.monotonic() > deadline or number >= MOST_ROUNDS):
                return
            turn = [each for each in entrants if each.failure is None and _is_due(each, reference, number, least_rounds)]
            generator.shuffle(turn)
            for entrant in turn:
                try:
                    entrant.sample(number, clock)
                except Exception as error:  # whatever it is: the others go on, and the report has the reason
                    entrant.failure = error.with_traceback(None)  # whose frames hold memory
            if reference.failure is not None:
                return


def _is_due(entrant: Entrant, reference: Entrant, number: int, least_rounds: int) -> bool:
    """Whether it takes part in a round: the slower, the more seldom, but often enough for a median if there are few rounds."""
    every = max(1, math.ceil(entrant.seconds / reference.seconds / SLOW))
    return number % every == 0 or 0 < least_rounds - number <= LEAST_SAMPLES - len(entrant.samples)


def keep_threads(threads: int, name: str) -> str | None:
    """Give torch its number of threads back where someone changed it, and say who: the others would no longer be timed as they are alone.

    A library that uses the same OpenMP runtime can change it for the whole process.
    """
    found = torch.get_num_threads()
    if found == threads:
        return None
    torch.set_num_threads(threads)
    return f"{name} changed torch's number of threads from {threads} to {found}; it was set back"


@contextmanager
def without_collector() -> Iterator[None]:
    """Python's garbage collector looks at everything there is, at times of its own."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(lower quartile, median, upper quartile)."""
    low, middle, high = np.quantile(np.asarray(values), (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)
