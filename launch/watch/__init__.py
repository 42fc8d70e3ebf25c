"""Sees to it that a job ends when one rank has failed, and that everyone is told which was the first.

    with Watch(...) as watch:
        for step in ...:
            watch.step = step
            ...
            with watch.patience():
                save()

Without it, the ranks that are left wait in a collective for as long as its timeout says, or report each other's hanging up; a launcher
knows that a process has ended, not why, and nothing of one that is stopped or late. Each rank connects to rank 0 (`member.py`, `hub.py`),
which decides (`judge.py`).
"""

from __future__ import annotations

import concurrent.futures.thread
import json
import os
import re
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType, TracebackType
from typing import NoReturn

import torch.distributed as dist

from launch.meeting import Venue
from launch.watch.hub import Hub
from launch.watch.judge import Judge, Position, Process, Verdict
from launch.watch.member import Member, this_process

__all__ = ["Watch"]

# What gloo, NCCL and stores say when another rank is gone.
CONSEQUENCE = re.compile(
    r"closed by peer|Connection reset|Broken pipe|Connection refused|connection was likely closed|remote process exited|Timed out waiting"
    r"|Socket Timeout|wait timeout|unhandled system error|aborted|recvBytes|sendBytes|failed to (send|recv|connect)",
    re.IGNORECASE,
)
SECONDS_FOR_VERDICT = 5.0
SECONDS_FOR_THREADS = 2.0  # that the job has started, to end when it has
OTHERS_CODE = ("site-packages", "dist-packages", f"{os.sep}lib{os.sep}python")  # not where a user looks for what a rank is doing
ROOT = os.getcwd() + os.sep


class Watch:
    """Ends this process with exit status 1 when this rank or another has failed, after rank 0's log has the first cause.

    What is raised inside is a failure, SystemExit too: a rank that leaves early leaves the others waiting. So is a thread that is still
    there at the end, which would keep the process for ever, or lose what it does. A process that fails ends at once, with all its threads.

    Args:
        venue: where the ranks have met; its store is this attempt's own. None: this process is alone.
        rank, world_size: of this process.
        heartbeat: seconds for which a rank may be silent, or keep others waiting in a collective; None: for as long as it likes. Longer
            than whatever one rank does alone without `patience`.
        launcher: pid of what has started this process, without which it ends; None: of nothing that must be there.
        expected: exceptions that speak for themselves, and need no traceback.
    """

    def __init__(
        self,
        venue: Venue | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        heartbeat: float | None = None,
        launcher: int | None = None,
        expected: tuple[type[BaseException], ...] = (),
    ) -> None:
        self._step = 0
        self._begun_before: Mapping[str, int] = {}  # collectives, in the step before
        self._begun_at_start: Mapping[str, int] = {}  # of this step
        self._patience = 0
        self._rank = rank
        self._expected = expected
        self._ending = threading.Lock()
        self._main = threading.main_thread().ident
        self._hub: Hub | None = None
        self._member: Member | None = None
        if venue is None or world_size == 1:
            return
        process = this_process(rank)
        if rank == 0:
            secret = uuid.uuid4().hex
            self._hub = Hub(Judge(heartbeat, world_size, time.monotonic()), secret)
            venue.store.set("watch", json.dumps([venue.address, self._hub.port, secret, asdict(process)]))
        host, port, secret, of_hub = json.loads(venue.store.get("watch"))
        address = ("127.0.0.1" if rank == 0 else host, port)
        self._member = Member(address, secret, process, Process(**of_hub), heartbeat, launcher, self._position, self._end)

    @property
    def step(self) -> int:
        """The step that this rank is at. To be set when it begins one."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        begun = _collectives()
        self._begun_before = _since(self._begun_at_start, begun)
        self._begun_at_start = begun
        self._step = step

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Others may wait for this rank meanwhile for as long as it takes, as when it saves or loads."""
        self._patience += 1
        try:
            yield
        finally:
            self._patience -= 1

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._fail(error)
        left = _threads_left()
        if left:
            self._fail(RuntimeError(f"its work is done, but threads that it has started are still there: {', '.join(left)}"))
        if self._member is not None:
            self._member.leave()
        if self._hub is not None and self._hub.close() is not None:
            _exit(1)  # another rank failed at its end

    def _fail(self, error: BaseException) -> NoReturn:
        """Say so, hear who was first, and end."""
        told = f"{type(error).__name__}: {error}"
        if isinstance(error, SystemExit):
            told = f"it left early, by exit({error.code!r})"
        if self._member is None:
            self._show(error)
            print(f"error: {told}", file=sys.stderr)
            _exit(1)
        follows = isinstance(error, (RuntimeError, OSError)) and CONSEQUENCE.search(told) is not None
        self._member.report(told, self._step_now(), follows=follows)
        verdict = self._member.wait_for_verdict(SECONDS_FOR_VERDICT)
        if verdict is None:
            self._show(error)
            print(f"error: rank {self._rank}, which does not hear from rank 0: {told}", file=sys.stderr)
            _exit(1)
        if verdict.rank == self._rank:
            self._show(error)
            _tell_torchrun(error)
        self._end(verdict)

    def _show(self, error: BaseException) -> None:
        if not isinstance(error, (*self._expected, SystemExit)) and error.__traceback__ is not None:
            traceback.print_exception(error)

    def _end(self, verdict: Verdict) -> NoReturn:
        with self._ending:  # whichever thread comes first; the other waits here for the end
            if self._hub is not None:
                self._hub.close()  # it has printed what happened, and the others have heard it
            else:
                print(f"rank {self._rank} ends: {verdict.text}", file=sys.stderr)
            _exit(1)

    def _step_now(self) -> str:
        return f"step {self._step}" if self._step else "its start"

    def _position(self) -> Position:
        frame = _frame_of_user(sys._current_frames().get(self._main or 0))
        return Position(
            step=self._step,
            begun=_since(self._begun_at_start, _collectives()),
            before=self._begun_before,
            place=self._step_now() if frame is None else f"{self._step_now()}, in {frame}",
            patient=self._patience > 0,
        )


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


def _threads_left() -> list[str]:
    """Threads that keep this process alive, and do not end soon."""
    until = time.monotonic() + SECONDS_FOR_THREADS
    while True:
        pools = set(getattr(concurrent.futures.thread, "_threads_queues", ()))  # idle ones of which the interpreter ends by itself
        alive = [thread for thread in threading.enumerate() if not thread.daemon and thread not in pools]
        left = [thread.name for thread in alive if thread is not threading.main_thread() and thread is not threading.current_thread()]
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.05)


def _tell_torchrun(error: BaseException) -> None:
    """Have torchrun's own summary name the error too, rather than that it knows of none."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)


def _exit(status: int) -> NoReturn:
    """Without waiting for threads, or for libraries that wait for ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
