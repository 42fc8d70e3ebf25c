"""Run a tracker on a thread of its own, so that training does not wait for a server. Used for destinations with `may_block`."""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from sharded_optim.trackers.destination import Status, Tracker

__all__ = ["Background"]

MOST_RECORDS = 1000  # records that may wait for a slow tracker; further ones are dropped
SECONDS_AFTER_FAILURE = 10.0  # for the remaining records of a run that has failed: its process is to end soon


class Background:
    """A tracker that passes records to another tracker, which is opened, called and finished on one background thread.

    Errors of that thread are raised by the next call of `log` or `finish`. If Python exits before `finish` is called, as after an uncaught
    error, it is called at exit, and the run has failed.

    Args:
        name: the name of the tracker, for the name of the thread.
        opens: opens the other tracker.
        seconds: the longest time that `finish` waits; for a run that has failed `SECONDS_AFTER_FAILURE`, if that is less.
    """

    def __init__(self, name: str, opens: Callable[[], Tracker], *, seconds: float) -> None:
        self._opens = opens
        self._seconds = seconds
        self._records: queue.Queue[tuple[int, Mapping[str, float]] | Status] = queue.Queue(MOST_RECORDS)
        self._error: Exception | None = None
        self._until: float | None = None  # when `finish` stops waiting
        self._has_status = False  # whether the final status of the run is in the queue
        atexit.register(self._finish_at_exit)
        # A daemon thread, because a client may wait minutes for a server, and the process must be able to end meanwhile.
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        try:
            self._records.put_nowait((step, values))
        except queue.Full:
            self._error = self._error or TimeoutError(f"{MOST_RECORDS} records wait to be written; step {step} is dropped")
        self._raise_error()

    def begin_finish(self, status: Status) -> None:
        """Have the thread finish, without waiting for it: several trackers then finish at the same time, before `finish` waits for each."""
        atexit.unregister(self._finish_at_exit)
        self._seconds = min(self._seconds, SECONDS_AFTER_FAILURE) if status == "failed" else self._seconds
        self._until = time.monotonic() + self._seconds
        with suppress(queue.Full):  # `finish` then waits for space
            self._records.put_nowait(status)
            self._has_status = True

    def finish(self, status: Status) -> None:
        if self._until is None:
            self.begin_finish(status)
        assert self._until is not None
        with suppress(queue.Full):
            if not self._has_status:
                self._records.put(status, timeout=max(self._until - time.monotonic(), 0.0))
            self._thread.join(max(self._until - time.monotonic(), 0.0))
        if self._error is None and self._thread.is_alive():
            raise TimeoutError(f"it has not written everything within {self._seconds:.0f} s")
        self._raise_error()

    def _finish_at_exit(self) -> None:
        if self._until is None:
            with suppress(Exception):  # there is no caller left to get the error
                self.finish("failed")

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        tracker = None  # if it cannot be opened, records are dropped
        try:
            tracker = self._opens()
            atexit.unregister(self._finish_at_exit)
            atexit.register(self._finish_at_exit)  # again: handlers run in reverse order, and the client may have registered its own
        except Exception as error:
            self._error = error
        record: tuple[int, Mapping[str, float]] | Status | None = None
        while not isinstance(record, str):  # the status is the last item of the queue
            record = self._records.get()
            try:
                if tracker is None:
                    continue
                if isinstance(record, str):
                    tracker.finish(record)
                else:
                    tracker.log(*record)
            except Exception as error:  # go on: a server may come back
                self._error = error
