"""Failure detection: end a job when one rank has failed or hangs, and name the first such rank in every log.

    with Watch(...) as watch:
        for step in ...:
            watch.begin_step(step)
            ...
            with watch.no_time_limit():
                save()

Without it, the remaining ranks would wait in a collective until its timeout. Ranks exchange heartbeats through the store of their attempt
(`heartbeats.py`), rank 0 decides which rank hangs (`hang_detector.py`), and each rank sees when another process of its launcher ends
(`siblings.py`).
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

from launch.launchers import RankInfo
from launch.rendezvous import RendezvousStore
from launch.watch.hang_detector import Heartbeat
from launch.watch.heartbeats import ENDING, HeartbeatExchange, end
from launch.watch.siblings import siblings

__all__ = ["Watch"]

# Error messages of gloo, NCCL and stores after another rank has ended.
CONSEQUENCE = re.compile(
    r"closed by peer|Connection reset|Broken pipe|Connection refused|connection was likely closed|remote process exited|Timed out waiting"
    r"|Socket Timeout|wait timeout|unhandled system error|aborted|recvBytes|sendBytes|failed to (send|recv|connect)",
    re.IGNORECASE,
)
SECONDS_FOR_VERDICT = 5.0
SECONDS_FOR_OTHERS = 60.0  # for other ranks to finish their work after this rank, where no heartbeat limits that time
# Paths of library code and of this package, which are skipped: messages name the innermost line of a user's code.
OTHERS_CODE = ("site-packages", "dist-packages", f"{os.sep}lib{os.sep}python", os.path.dirname(__file__))
ROOT = os.getcwd() + os.sep


class Watch:
    """End this process with exit status 1 when this rank or another has failed, once rank 0's log has the first cause.

    Any exception in the `with` block is a failure, SystemExit too, as a rank that leaves early leaves the others waiting. A process that
    fails ends at once, with all its threads.

    Args:
        rendezvous: has the store of this attempt alone. None: this process is the only rank.
        info: the rank of this process, which ends when its launcher does; None: it is the only rank.
        heartbeat: seconds for which a rank may send no heartbeat, the store may not answer, or a rank may keep others waiting in a
            collective; None: no limit. It must be longer than anything that one rank does alone outside `no_time_limit`.
        expected: exceptions that are shown without a traceback.
    """

    def __init__(
        self,
        rendezvous: RendezvousStore | None = None,
        info: RankInfo | None = None,
        *,
        heartbeat: float | None = None,
        expected: tuple[type[BaseException], ...] = (),
    ) -> None:
        self.step = 0  # current step of this rank
        self._begun_before: Mapping[str, int] = {}  # collectives begun in the step before, by process group
        self._begun_at_start: Mapping[str, int] = {}  # collectives begun before this step, by process group
        self._without_limit = 0  # nested calls of `no_time_limit`
        info = info or RankInfo()
        self._rank = info.rank
        self._expected = expected
        self._exchange: HeartbeatExchange | None = None
        if rendezvous is not None and info.world_size > 1:
            others = siblings(info.launcher_pid, next(iter(info.launcher.variables), "RANK"))
            self._exchange = HeartbeatExchange(rendezvous.store, info, heartbeat, others, self._heartbeat)

    def begin_step(self, step: int) -> None:
        """Record that this rank begins a step, and how many collectives it has begun so far."""
        begun = _collectives()
        self._begun_before, self._begun_at_start = _since(self._begun_at_start, begun), begun
        self.step = step

    @contextmanager
    def no_time_limit(self) -> Iterator[None]:
        """Let this rank keep others waiting for any time inside the `with` block, as when it saves or loads."""
        self._without_limit += 1
        try:
            yield
        finally:
            self._without_limit -= 1

    def seconds_since_heartbeat(self) -> dict[int, float]:
        """Return the seconds since each rank's last heartbeat, on rank 0, except for ranks that have done their work. Reads memory only."""
        return {0: 0.0} if self._exchange is None else self._exchange.hang_detector.seconds_since_heartbeat(time.monotonic())

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._fail(error)
        if self._exchange is not None:
            self._exchange.leave(SECONDS_FOR_OTHERS)

    def _fail(self, error: BaseException) -> NoReturn:
        """Report this rank's error, wait for the verdict on which rank failed first, and end."""
        text = f"it left early, by exit({error.code!r})" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        follows = isinstance(error, (RuntimeError, OSError)) and CONSEQUENCE.search(text) is not None
        verdict = self._exchange and self._exchange.fail(text, self._step_now(), SECONDS_FOR_VERDICT, follows=follows)
        with ENDING:
            if verdict is None or verdict.rank == self._rank:
                if not isinstance(error, (*self._expected, SystemExit)) and error.__traceback__ is not None:
                    traceback.print_exception(error)
                if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun's own summary then names the error too
                    get_error_handler().record_exception(error)
            if verdict is None:
                print(f"error: rank {self._rank}: {text}" if self._exchange else f"error: {text}", file=sys.stderr)
        if verdict is not None:
            time.sleep(SECONDS_FOR_VERDICT)
        end()

    def _step_now(self) -> str:
        return f"step {self.step}" if self.step else "its start"

    def _heartbeat(self, number: int, has_left: bool) -> Heartbeat:
        frame = _frame_of_user(sys._current_frames().get(threading.main_thread().ident or 0))
        location = self._step_now() if frame is None else f"{self._step_now()}, in {frame}"
        who = {"rank": self._rank, "pid": os.getpid(), "host": socket.gethostname(), "number": number, "has_left": has_left}
        begun = {"begun": _since(self._begun_at_start, _collectives()), "before": self._begun_before}
        return Heartbeat(**who, **begun, step=self.step, location=location, has_no_limit=self._without_limit > 0)


def _frame_of_user(frame: FrameType | None) -> str | None:
    """Return function, file and line of the innermost frame of a user's code; None if there is none."""
    while frame is not None:
        code = frame.f_code
        if not any(part in code.co_filename for part in OTHERS_CODE) and not code.co_filename.startswith("<"):
            return f"{code.co_name} ({code.co_filename.removeprefix(ROOT)}:{frame.f_lineno})"
        frame = frame.f_back
    return None


def _collectives() -> dict[str, int]:
    """Count the collectives that this rank has begun, by process group. Tried with torch 2.11 and 2.13."""
    try:
        groups = list(dist.distributed_c10d._world.pg_names.items())
        return {name: group._get_sequence_number_for_group() for group, name in groups}  # pyright: ignore[reportAttributeAccessIssue]
    except (AttributeError, RuntimeError):  # groups may end meanwhile, and these names are private to torch
        return {}


def _since(start: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    return {group: count - start.get(group, 0) for group, count in now.items()}
