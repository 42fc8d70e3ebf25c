"""Threads that a job leaves behind when its work is done: they would keep its process for ever, or lose what they do."""

from __future__ import annotations

import concurrent.futures.thread
import threading
import time

__all__ = ["check_none_left"]

SECONDS_FOR_THREADS = 2.0  # that the job has started, to end when it has


def check_none_left() -> None:
    """Wait a little for the threads that keep this process alive.

    Raises:
        RuntimeError: they do not end. Names them.
    """
    until = time.monotonic() + SECONDS_FOR_THREADS
    while left := _threads_left():
        if time.monotonic() > until:
            raise RuntimeError(f"its work is done, but threads that it has started are still there: {', '.join(left)}")
        time.sleep(0.05)


def _threads_left() -> list[str]:
    pools = set(getattr(concurrent.futures.thread, "_threads_queues", ()))  # idle ones of which the interpreter ends by itself
    alive = [thread for thread in threading.enumerate() if not thread.daemon and thread not in pools]
    return [thread.name for thread in alive if thread is not threading.main_thread() and thread is not threading.current_thread()]
