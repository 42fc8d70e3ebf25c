"""Check for threads that still run when a job's work is done: they would keep the process running, or their own work would be lost."""

from __future__ import annotations

import concurrent.futures.thread
import threading
import time

__all__ = ["check_none_left"]

SECONDS_FOR_THREADS = 2.0  # for threads to end after the job's work


def check_none_left() -> None:
    """Wait two seconds for the threads that keep this process running.

    Raises:
        RuntimeError: some threads do not end. The message names them.
    """
    until = time.monotonic() + SECONDS_FOR_THREADS
    while left := _threads_left():
        if time.monotonic() > until:
            raise RuntimeError(f"its work is done, but threads that it has started are still there: {', '.join(left)}")
        time.sleep(0.05)


def _threads_left() -> list[str]:
    pools = set(getattr(concurrent.futures.thread, "_threads_queues", ()))  # at exit the interpreter ends idle threads of pools itself
    running = [thread for thread in threading.enumerate() if not thread.daemon and thread not in pools]
    return [thread.name for thread in running if thread is not threading.main_thread() and thread is not threading.current_thread()]
