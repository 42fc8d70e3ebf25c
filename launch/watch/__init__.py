"""Ends a job when one rank has failed, and says in every log which was the first.

    with Watch(...) as watch:
        for step in ...:
            watch.step = step
            ...
            with watch.patience():
                save()

Without it, the ranks that are left wait in a collective for as long as its timeout says. Ranks exchange beats through the store by which
they have met (`beats.py`), rank 0 decides who hangs (`judge.py`), and each sees which processes of its launcher are gone (`siblings.py`).
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from launch.rendezvous import RendezvousStore
from launch.watch.beats import ENDING, Beats, end
from launch.watch.judge import Beat
from launch.watch.siblings import siblings

__all__ = ["Watch"]

# What gloo, NCCL and stores say when another rank is gone.
CONSEQUENCE = re.compile(
    r"closed by peer|Connection reset|Broken pipe|Connection refused|connection was likely closed|remote process exited|Timed out waiting"
    r"|Socket Timeout|wait timeout|unhandled system error|aborted|recvBytes|sendBytes|failed to (send|recv|connect)",
    re.IGNORECASE,
)
SECONDS_FOR_VERDICT = 5.0
SECONDS_FOR_OTHERS = 60.0  # to do their work when this rank has done its own, where no heartbeat limits them
# Not where a user looks for what a rank is doing.
OTHERS_CODE = ("site-packages", "dist-packages", f"{os.sep}lib{os.sep}python", os.path.dirname(__file__))
ROOT = os.getcwd() + os.sep


class Watch:
    """Ends this process with exit status 1 when this rank or another has failed, after rank 0's log has the first cause.

    What is raised inside is a failure, SystemExit too: a rank that leaves early leaves the others waiting. A process that fails ends at
    once, with all its threads.

    Args:
        rendezvous: where the ranks have met; its store is this attempt's own. None: this process is alone.
        heartbeat: seconds for which a rank or the store may be silent, or a rank may keep others waiting in a collective; None: for as long
            as they like. Longer than whatever one rank does alone without `patience`.
        launcher: pid of what has started this process, without which it ends; None: of nothing that must be there.
        variable: of the environment, in which the launcher gives ranks their number.
        expected: exceptions that need no traceback.
    """

    def __init__(
        self,
        rendezvous: RendezvousStore | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        heartbeat: float | None = None,
        launcher: int | None = None,
        variable: str = "RANK",
        expected: tuple[type[BaseException], ...] = (),
    ) -> None:
        self._step = 0
        self._begun_before: Mapping[str, int] = {}  # collectives, in the step before
        self._begun_at_start: Mapping[str, int] = {}  # of this step
        self._patience = 0
        self._rank = rank
        self._expected = expected
        self._beats: Beats | None = None
        if rendezvous is not None and world_size > 1:
            others = siblings(launcher, variable)
            self._beats = Beats(rendezvous.store, rank, world_size, heartbeat, launcher, others, self._beat)

    @property
    def step(self) -> int:
        """The step that this rank is at. To be set when it begins one."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        begun = _collectives()
        self._begun_before, self._begun_at_start = _since(self._begun_at_start, begun), begun
        self._step = step

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Others may wait for this rank meanwhile for as long as it takes, as when it saves or loads."""
        self._patience += 1
        try:
            yield
        finally:
            self._patience -= 1

    def silences(self) -> dict[int, float]:
        """Seconds since each rank was last heard of, on rank 0; ranks that have done their work are left out. Reads memory alone."""
        return {0: 0.0} if self._beats is None else self._beats.silences()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._fail(error)
        if self._beats is not None:
            self._beats.leave(SECONDS_FOR_OTHERS)

    def _fail(self, error: BaseException) -> NoReturn:
        """Say so, learn who was first, and end."""
        text = f"it left early, by exit({error.code!r})" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        follows = isinstance(error, (RuntimeError, OSError)) and CONSEQUENCE.search(text) is not None
        verdict = self._beats and self._beats.fail(text, self._step_now(), SECONDS_FOR_VERDICT, follows=follows)
        with ENDING:
            if verdict is None or verdict.rank == self._rank:
                if not isinstance(error, (*self._expected, SystemExit)) and error.__traceback__ is not None:
                    traceback.print_exception(error)
                if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun's own summary then names the error too
                    get_error_handler().record_exception(error)
            if verdict is None:
                print(f"error: rank {self._rank}: {text}" if self._beats else f"error: {text}", file=sys.stderr)
        if verdict is not None:
            time.sleep(SECONDS_FOR_VERDICT)
        end()

    def _step_now(self) -> str:
        return f"step {self._step}" if self._step else "its start"

    def _beat(self, number: int, has_left: bool) -> Beat:
        frame = _frame_of_user(sys._current_frames().get(threading.main_thread().ident or 0))
        place = self._step_now() if frame is None else f"{self._step_now()}, in {frame}"
        who = {"rank": self._rank, "pid": os.getpid(), "host": socket.gethostname(), "number": number, "has_left": has_left}
        begun = {"begun": _since(self._begun_at_start, _collectives()), "before": self._begun_before}
        return Beat(**who, **begun, step=self._step, place=place, patient=self._patience > 0)


def _frame_of_user(frame: FrameType | None) -> str | None:
    """Where a thread is, in code that is not a library's."""
    while frame is not None:
        code = frame.f_code
        if not any(part in code.co_filename for part in OTHERS_CODE) and not code.co_filename.startswith("<"):
            return f"{code.co_name} ({code.co_filename.removeprefix(ROOT)}:{frame.f_lineno})"
        frame = frame.f_back
    return None


def _collectives() -> dict[str, int]:
    """How many collectives this rank has begun, by process group. Tried with torch 2.11 and 2.13."""
    try:
        groups = list(dist.distributed_c10d._world.pg_names.items())
        return {name: group._get_sequence_number_for_group() for group, name in groups}  # pyright: ignore[reportAttributeAccessIssue]
    except (AttributeError, RuntimeError):  # groups come and go, and these names are torch's own
        return {}


def _since(start: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    return {group: count - start.get(group, 0) for group, count in now.items()}
