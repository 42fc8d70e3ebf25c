"""What ranks tell each other through the store of their attempt, on threads of their own.

    beat/RANK   that the rank is alive and how far it is, once a second
    verdict     why the job ends: whoever writes it first is right, and all ranks end by it
    echo        the first rank whose error looks like the loss of another rank
    same/ERROR  how many ranks have failed with this error
    printed     rank 0's log has the verdict

Rank 0 reads all beats, the others rank 0's alone: 1,000 ranks are 6,000 small requests a second, and 300 kB that rank 0 reads. A request
may wait without end, whatever timeout the store was given: a second thread sees that.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, NoReturn

from torch.distributed.distributed_c10d import Store

from launch.watch.judge import Beat, Judge, Verdict
from launch.watch.siblings import Sibling, gone

__all__ = ["ENDING", "Beats", "before_end", "end"]

MakeBeat = Callable[[int, bool], Beat]  # of this rank; given its number, and whether the rank has left
ENDING = threading.Lock()  # while it is held, nothing here ends this process
ROUND_SECONDS = 0.2
BEAT_SECONDS = 1.0
SLEPT_SECONDS = 2.0  # that a round takes longer, and this process has not run
SECONDS_FOR_CAUSES = 2.5  # in which the cause of an error that only follows from it is told, or its rank misses two beats
ROUNDS_TO_SHARE = 3  # for ranks that fail with the same error to say so, once there is a verdict
SECONDS_TO_PRINT = 2.0  # for rank 0, before other ranks end: some launchers end all when one has ended
SECONDS_TO_END = 5.0  # for all of this, if the store does not answer any more
SECONDS_TO_FLUSH = 12.0  # for what is to be done before this process ends; trackers take 10 s at most

_flushing = threading.Lock()
_actions: list[Callable[[], None]] = []  # before this process ends


class Beats:
    """Tells the others about this rank, and this rank about the others. Arguments are as `Watch` has them."""

    def __init__(
        self, store: Store, rank: int, world_size: int, heartbeat: float | None, launcher: int | None, others: list[Sibling], beat: MakeBeat
    ) -> None:
        self._store: Any = store.clone()  # pyright: ignore[reportAttributeAccessIssue]  # a connection that nothing else waits for
        self._rank, self._all = rank, range(world_size)
        self._watched = self._all if rank == 0 else self._all[:1]
        self._judge = Judge(heartbeat, self._watched, time.monotonic())
        self._launcher, self._siblings, self._beat = launcher, others, beat
        self._failure: Verdict | None = None  # this rank's
        self._follows, self._counted, self._failed_at = False, False, 0.0
        self._before: list[Beat | None] | None = None  # all beats when this rank wrote `echo`
        self._verdict: Verdict | None = None
        self._answered = time.monotonic()  # when the store did, the last time
        self._leaving, self._over, self._decided = False, threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="watch", daemon=True).start()
        threading.Thread(target=self._time_store, args=(heartbeat,), name="watch-store", daemon=True).start()

    def fail(self, error: str, place: str, timeout: float, *, follows: bool) -> Verdict | None:
        """Say that this rank has failed, or `follows` another's end, and wait for the verdict, by which a thread then ends this process."""
        self._follows, self._failed_at = follows, time.monotonic()
        self._failure = self._own(f"at {place}: {error}", f"same/{hashlib.sha256(error.encode()).hexdigest()}")
        self._decided.wait(timeout)
        return self._verdict

    def leave(self, timeout: float) -> None:
        """Say that this rank has done its work. Rank 0 waits until all have."""
        self._leaving = True
        self._over.wait(timeout)

    def silences(self) -> dict[int, float]:
        """See `Judge.silences`: on rank 0 of all ranks, elsewhere of rank 0."""
        return self._judge.silences(time.monotonic())

    def _run(self) -> None:
        try:
            verdict = self._watch()
            if verdict is not None:
                self._decide(verdict)
                self._tell(verdict)
        except Exception as error:  # the store is gone, or somebody has written something else to it
            if not (self._leaving and self._rank != 0):  # then rank 0 has seen all leave, and the store may end
                self._lose(f"cannot use the store by which ranks are watched: {error}")
        if self._verdict is not None:
            end()
        self._over.set()

    def _time_store(self, heartbeat: float | None) -> None:
        """End this rank if the store does not answer."""
        before = time.monotonic()
        while not self._over.wait(ROUND_SECONDS):
            now = time.monotonic()
            self._answered += now - before if now - before > ROUND_SECONDS + SLEPT_SECONDS else 0.0
            before, silence = now, now - self._answered
            limit = heartbeat if self._verdict is None else SECONDS_TO_END
            if limit is not None and silence >= limit:
                self._lose(f"has lost the store by which ranks are watched, which has not answered for {silence:.0f} s")
                end()

    def _watch(self) -> Verdict | None:
        """Until there is a verdict, or none is to be expected."""
        for rank in self._all if self._rank == 0 else ():
            self._store.compare_set(f"beat/{rank}", "", "")  # whoever reads a key that is not there waits for it
        number, before, beaten = 0, time.monotonic(), float("-inf")
        while True:
            now = time.monotonic()
            if now - before > ROUND_SECONDS + SLEPT_SECONDS:
                self._judge.slept(now - before)
            before = self._answered = now
            self._count_failure()
            if self._store.check(["verdict"]):
                return Verdict(**json.loads(self._store.get("verdict")))
            leaving = self._leaving  # as the beat says; it may change at any time
            if now - beaten >= BEAT_SECONDS or leaving:
                beaten, number = now, number + 1
                self._store.set(f"beat/{self._rank}", json.dumps(asdict(self._beat(number, leaving))))
                for rank, beat in zip(self._watched, self._beats(self._watched), strict=True):
                    self._judge.read(rank, beat, now)
                if leaving and (self._rank != 0 or self._judge.is_over):
                    return None
            found = self._orphaned() or self._failed(now) or self._judge.verdict(now) or self._gone()
            if found is not None:
                return Verdict(**json.loads(self._store.compare_set("verdict", "", json.dumps(asdict(found)))))

    def _decide(self, verdict: Verdict) -> None:
        self._verdict, self._answered = verdict, time.monotonic()
        self._decided.set()

    def _tell(self, verdict: Verdict) -> None:
        """Print a verdict, first into rank 0's log."""
        for _ in range(ROUNDS_TO_SHARE if verdict.shared else 0):
            time.sleep(ROUND_SECONDS)
            self._count_failure()
        until = time.monotonic() + (0.0 if verdict.rank == 0 else SECONDS_TO_PRINT)  # rank 0 may not be able to
        while not (prints := self._rank == 0 or time.monotonic() >= until) and not self._store.check(["printed"]):
            time.sleep(ROUND_SECONDS)
        text = verdict.text(self._store.add(verdict.shared, 0) if verdict.shared else 1)
        print(f"error: {text}" if prints else f"rank {self._rank} ends: {text}", file=sys.stderr, flush=True)
        if prints:
            self._store.set("printed", "")
        for sibling in self._siblings:
            if verdict.hangs and sibling.rank == verdict.rank:  # launchers wait for it, some for half a minute
                signal.pidfd_send_signal(sibling.process, signal.SIGKILL)

    def _lose(self, what: str) -> None:
        """Decide without the store."""
        if self._verdict is None:
            verdict = self._orphaned() or self._own(what)
            print(f"error: {verdict.text(1)}", file=sys.stderr, flush=True)
            self._decide(verdict)

    def _own(self, what: str, shared: str = "") -> Verdict:
        return Verdict(rank=self._rank, who=str(self._beat(0, False)), what=what, shared=shared)

    def _orphaned(self) -> Verdict | None:
        lost = f"failed first: what has started it (pid {self._launcher}) is gone"
        return None if self._launcher in (None, os.getppid()) else self._own(lost)

    def _failed(self, now: float) -> Verdict | None:
        """That this rank has failed; or another, of which its error is the consequence."""
        if self._failure is None or not self._follows:
            return self._failure
        if self._before is None:
            is_first = self._store.compare_set("echo", "", str(self._rank)) == str(self._rank).encode()
            self._before = self._beats(self._all) if is_first else []
        if now - self._failed_at < SECONDS_FOR_CAUSES or not self._before:  # another rank looks for the cause
            return None
        for before, after in zip(self._before, self._beats(self._all), strict=True):
            if before is not None and before == after and not before.has_left:
                what = f"is gone, or its machine is; last heard of at {before.place}. {self._failure.who} has lost it, {self._failure.what}"
                return Verdict(rank=before.rank, who=str(before), what=what)
        return self._failure

    def _gone(self) -> Verdict | None:
        """That the process of a sibling has ended before its work was done. Waits for it."""
        for sibling in gone(self._siblings, ROUND_SECONDS):
            self._siblings.remove(sibling)
            (beat,) = self._beats([sibling.rank])
            if beat is not None and beat.pid == sibling.pid and not beat.has_left:  # else what a rank of an earlier attempt has left
                why = f"it was killed, crashed, or left by os._exit. Last heard of at {beat.place}"
                return self._orphaned() or Verdict(rank=beat.rank, who=str(beat), what=f"ended first, without a word: {why}")
        return None

    def _beats(self, ranks: Iterable[int]) -> list[Beat | None]:
        """As they stand in the store."""
        keys = {rank: f"beat/{rank}" for rank in ranks}
        are_there = self._rank == 0 or self._store.check(list(keys.values()))  # rank 0 has written them
        found = self._store.multi_get(list(keys.values())) if are_there else [b""] * len(keys)
        return [Beat.from_json(rank, text) for rank, text in zip(keys, found, strict=True)]

    def _count_failure(self) -> None:
        """Have the others know how many ranks have failed with the same error."""
        if self._failure is not None and not self._counted:
            self._counted = True
            self._store.add(self._failure.shared, 1)


def before_end(action: Callable[[], None]) -> None:
    """Have `end` call a function, on another thread, for `SECONDS_TO_FLUSH` at most. The other ranks do not wait for it."""
    _actions.append(action)


def end() -> NoReturn:
    """End this process, without waiting for threads, or for libraries that wait for ranks."""
    with _flushing:  # who comes second waits too
        while _actions:
            thread = threading.Thread(target=_actions.pop(), name="watch-flush", daemon=True)
            thread.start()
            thread.join(SECONDS_TO_FLUSH)
    with ENDING:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
