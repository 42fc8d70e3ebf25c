"""Exchange heartbeats and verdicts through the store of an attempt, on separate threads.

Keys of the store:

    beat/RANK    the rank's heartbeat, written once a second: shows that the rank runs, and its progress
    verdict      why the job ends: the first one written counts, and all ranks end because of it
    consequence  the first rank whose error looks like the consequence of another rank's end
    same/ERROR   the number of ranks that have failed with this error
    printed      exists once rank 0's log has the verdict

Rank 0 reads all heartbeats, the others only rank 0's: 1,000 ranks make 6,000 small requests a second, and rank 0 reads 300 kB. A request
may block forever, whatever the timeout of the store: a second thread detects that.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

from torch.distributed.distributed_c10d import Store

from launch.launchers import RankInfo
from launch.watch.hang_detector import HangDetector, Heartbeat, Verdict
from launch.watch.siblings import Sibling, wait_for_exit

__all__ = ["ENDING", "HeartbeatExchange", "before_end", "end"]

MakeHeartbeat = Callable[[int, bool], Heartbeat]  # (number of the heartbeat, whether this rank has left) -> heartbeat of this rank
ENDING = threading.Lock()  # while it is held, no thread of this file ends the process
ROUND_SECONDS = 0.2
HEARTBEAT_SECONDS = 1.0  # between two heartbeats
SLEPT_SECONDS = 2.0  # a round that takes this much longer shows that this process was suspended
# After an error that may follow from another: for its cause to be written, or for the rank at fault to miss two heartbeats.
SECONDS_FOR_CAUSES = 2.5
ROUNDS_TO_SHARE = 3  # after a verdict: for ranks with the same error to be counted
SECONDS_TO_PRINT = 2.0  # for rank 0 to print before other ranks end: some launchers end all ranks when one has ended
SECONDS_TO_END = 5.0  # for the report of a verdict, if the store does not answer any more
SECONDS_TO_FLUSH = 12.0  # for each action before this process ends; trackers take 10 s at most

_flushing = threading.Lock()
_actions: list[Callable[[], None]] = []  # called before this process ends


class HeartbeatExchange:
    """Writes this rank's heartbeats and reads those of others, until a verdict ends this process. Other arguments are those of `Watch`.

    Args:
        store: the store of the attempt.
        others: the processes of other ranks on this machine.
        make: returns a heartbeat of this rank.

    Attributes:
        hang_detector: observes all ranks on rank 0, and rank 0 on other ranks.
    """

    def __init__(self, store: Store, info: RankInfo, heartbeat: float | None, others: list[Sibling], make: MakeHeartbeat) -> None:
        self._store: Any = store.clone()  # pyright: ignore[reportAttributeAccessIssue]  # a connection on which nothing else waits
        self._rank, self._all = info.rank, range(info.world_size)
        self._watched = self._all if info.rank == 0 else self._all[:1]
        self.hang_detector = HangDetector(heartbeat, self._watched, time.monotonic())
        self._launcher, self._siblings, self._make = info.launcher_pid, others, make
        self._failure: Verdict | None = None  # on this rank's own error
        self._follows, self._counted, self._failed_at = False, False, 0.0
        self._before: list[Heartbeat | None] | None = None  # heartbeats of all ranks when this rank wrote `consequence`
        self._verdict: Verdict | None = None
        self._answered = time.monotonic()  # when the store last answered
        self._leaving, self._over, self._decided = False, threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="watch", daemon=True).start()
        threading.Thread(target=self._time_store, args=(heartbeat,), name="watch-store", daemon=True).start()

    def fail(self, error: str, place: str, timeout: float, *, follows: bool) -> Verdict | None:
        """Report that this rank has failed, and return the verdict, or None after the timeout. A thread then ends this process.

        Args:
            error: the error of this rank, as text.
            place: the step at which this rank failed, for the message.
            timeout: seconds to wait for the verdict.
            follows: whether the error looks like the consequence of another rank's end.
        """
        self._follows, self._failed_at = follows, time.monotonic()
        self._failure = self._verdict_on_self(f"at {place}: {error}", f"same/{hashlib.sha256(error.encode()).hexdigest()}")
        self._decided.wait(timeout)
        return self._verdict

    def leave(self, timeout: float) -> None:
        """Report that this rank has done its work. Rank 0 waits until all ranks have, for at most `timeout` seconds."""
        self._leaving = True
        self._over.wait(timeout)

    def _run(self) -> None:
        try:
            verdict = self._wait_for_verdict()
            if verdict is not None:
                self._decide(verdict)
                self._report(verdict)
        except Exception as error:  # the store has ended, or holds something that was not written here
            if not (self._leaving and self._rank != 0):  # then rank 0 has seen all leave, and the store may end
                self._decide_without_store(f"cannot use the store that carries heartbeats: {error}")
        if self._verdict is not None:
            end()
        self._over.set()

    def _time_store(self, heartbeat: float | None) -> None:
        """End this rank if the store does not answer."""
        before = time.monotonic()
        while not self._over.wait(ROUND_SECONDS):
            now = time.monotonic()
            self._answered += now - before if now - before > ROUND_SECONDS + SLEPT_SECONDS else 0.0
            before, seconds = now, now - self._answered
            limit = heartbeat if self._verdict is None else SECONDS_TO_END
            if limit is not None and seconds >= limit:
                self._decide_without_store(f"has lost the store that carries heartbeats, which has not answered for {seconds:.0f} s")
                end()

    def _wait_for_verdict(self) -> Verdict | None:
        """Write and read heartbeats until there is a verdict, and return it; None if this rank has done its work first."""
        for rank in self._all if self._rank == 0 else ():
            self._store.compare_set(f"beat/{rank}", "", "")  # reading a key that does not exist would wait for it
        number, before, written = 0, time.monotonic(), float("-inf")
        while True:
            now = time.monotonic()
            if now - before > ROUND_SECONDS + SLEPT_SECONDS:
                self.hang_detector.slept(now - before)
            before = self._answered = now
            self._count_failure()
            if self._store.check(["verdict"]):
                return Verdict(**json.loads(self._store.get("verdict")))
            leaving = self._leaving  # read once: another thread may set it at any time
            if now - written >= HEARTBEAT_SECONDS or leaving:
                written, number = now, number + 1
                self._store.set(f"beat/{self._rank}", json.dumps(asdict(self._make(number, leaving))))
                for rank, heartbeat in zip(self._watched, self._read(self._watched), strict=True):
                    self.hang_detector.read(rank, heartbeat, now)
                if leaving and (self._rank != 0 or self.hang_detector.is_over):
                    return None
            own = self._orphaned() or self._failed(now) or self.hang_detector.verdict(now) or self._exited()
            if own is not None:
                return Verdict(**json.loads(self._store.compare_set("verdict", "", json.dumps(asdict(own)))))

    def _decide(self, verdict: Verdict) -> None:
        self._verdict, self._answered = verdict, time.monotonic()
        self._decided.set()

    def _report(self, verdict: Verdict) -> None:
        """Print a verdict, first into rank 0's log, and kill the rank that hangs if it is on this machine."""
        for _ in range(ROUNDS_TO_SHARE if verdict.shared else 0):
            time.sleep(ROUND_SECONDS)
            self._count_failure()
        until = time.monotonic() + (0.0 if verdict.rank == 0 else SECONDS_TO_PRINT)  # a failed rank 0 may be unable to print
        while not (prints := self._rank == 0 or time.monotonic() >= until) and not self._store.check(["printed"]):
            time.sleep(ROUND_SECONDS)
        text = verdict.text(self._store.add(verdict.shared, 0) if verdict.shared else 1)
        print(f"error: {text}" if prints else f"rank {self._rank} ends: {text}", file=sys.stderr, flush=True)
        if prints:
            self._store.set("printed", "")
        for sibling in self._siblings:
            if verdict.hangs and sibling.rank == verdict.rank:  # launchers wait for it, some for half a minute
                signal.pidfd_send_signal(sibling.process, signal.SIGKILL)

    def _decide_without_store(self, what: str) -> None:
        """Decide and print a verdict for this rank alone, as the store cannot be used."""
        if self._verdict is None:
            verdict = self._orphaned() or self._verdict_on_self(what)
            print(f"error: {verdict.text(1)}", file=sys.stderr, flush=True)
            self._decide(verdict)

    def _verdict_on_self(self, what: str, shared: str = "") -> Verdict:
        return Verdict(rank=self._rank, who=str(self._make(0, False)), what=what, shared=shared)

    def _orphaned(self) -> Verdict | None:
        """Return a verdict on this rank if its launcher has ended, else None."""
        what = f"failed first: its launcher (pid {self._launcher}) has ended"
        return None if self._launcher in (None, os.getppid()) else self._verdict_on_self(what)

    def _failed(self, now: float) -> Verdict | None:
        """Return a verdict on this rank if it has failed, or on another rank whose end has caused the error; None if there is none yet."""
        if self._failure is None or not self._follows:
            return self._failure
        if self._before is None:
            is_first = self._store.compare_set("consequence", "", str(self._rank)) == str(self._rank).encode()
            self._before = self._read(self._all) if is_first else []
        if now - self._failed_at < SECONDS_FOR_CAUSES or not self._before:  # another rank looks for the cause
            return None
        for before, after in zip(self._before, self._read(self._all), strict=True):
            if before is not None and before == after and not before.has_left:
                lost = f"has ended, or its machine is lost; last heartbeat at {before.location}"
                what = f"{lost}. {self._failure.who} lost its connection {self._failure.what}"
                return Verdict(rank=before.rank, who=str(before), what=what)
        return self._failure

    def _exited(self) -> Verdict | None:
        """Wait one round for other processes of the launcher to end; return a verdict on a rank that ended before its work was done."""
        for sibling in wait_for_exit(self._siblings, ROUND_SECONDS):
            self._siblings.remove(sibling)
            (last,) = self._read([sibling.rank])
            if last is not None and last.pid == sibling.pid and not last.has_left:  # else the heartbeat is an earlier attempt's
                why = f"it was killed, crashed, or called os._exit. Last heartbeat at {last.location}"
                return self._orphaned() or Verdict(rank=last.rank, who=str(last), what=f"ended first, without an error: {why}")
        return None

    def _read(self, ranks: Sequence[int]) -> list[Heartbeat | None]:
        """Read the heartbeats of these ranks from the store."""
        keys = [f"beat/{rank}" for rank in ranks]
        exist = self._rank == 0 or self._store.check(keys)  # rank 0 has created the keys
        texts = self._store.multi_get(keys) if exist else [b""] * len(keys)
        return [Heartbeat.from_json(rank, text) for rank, text in zip(ranks, texts, strict=True)]

    def _count_failure(self) -> None:
        """Add this rank, once, to the number of ranks that have failed with the same error."""
        if self._failure is not None and not self._counted:
            self._counted = True
            self._store.add(self._failure.shared, 1)


def before_end(action: Callable[[], None]) -> None:
    """Have `end` call a function, on another thread, for `SECONDS_TO_FLUSH` at most. The other ranks do not wait for it."""
    _actions.append(action)


def end() -> NoReturn:
    """End this process, without waiting for threads, or for libraries that wait for ranks."""
    with _flushing:  # a second thread that ends the process waits too
        while _actions:
            thread = threading.Thread(target=_actions.pop(), name="watch-flush", daemon=True)
            thread.start()
            thread.join(SECONDS_TO_FLUSH)
    with ENDING:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
