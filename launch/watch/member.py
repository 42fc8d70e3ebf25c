"""A rank's own watch: a thread that says once a second that the rank is alive and how far it is, and that ends it when the job ends."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from launch.watch.judge import Position, Process, Verdict
from launch.watch.wire import Line, Message

__all__ = ["Member", "this_process"]

BEAT_SECONDS = 1.0
SLEPT_SECONDS = 2.0  # that a round takes longer, and this process has not run
CONNECT_SECONDS = 30.0
SECONDS_TO_END = 0.5  # for the main thread to come to its own error, once there is a verdict


class Member:
    """Connects a rank to the hub.

    Args:
        address: of the hub.
        secret: of this attempt.
        process: this one.
        hub: the process that has the hub.
        heartbeat: seconds after which a silent hub is taken for stopped; None: never.
        launcher: pid of what has started this process, without which it ends; None: of nothing that must be there.
        position: tells how far this rank is.
        on_verdict: called once, on the thread, some time after `wait_for_verdict` returns it.
    """

    def __init__(
        self,
        address: tuple[str, int],
        secret: str,
        process: Process,
        hub: Process,
        heartbeat: float | None,
        launcher: int | None,
        position: Callable[[], Position],
        on_verdict: Callable[[Verdict], None],
    ) -> None:
        self._line = Line(socket.create_connection(address, CONNECT_SECONDS))
        self._line.send({"secret": secret, "process": asdict(process)})
        self._process = process
        self._hub = hub
        self._heartbeat = heartbeat
        self._launcher = launcher
        self._position = position
        self._on_verdict = on_verdict
        self._sending = threading.Lock()
        self._leaving = False
        self._verdict: Verdict | None = None
        self._decided = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def report(self, error: str, place: str, *, follows: bool) -> None:
        """Say that this rank has failed."""
        self._say({"failed": error, "place": place, "follows": follows})

    def wait_for_verdict(self, timeout: float) -> Verdict | None:
        """Which rank failed first; None if that is not known in time."""
        self._decided.wait(timeout)
        return self._verdict

    def leave(self) -> None:
        """This rank has done its work."""
        self._leaving = True
        self._say({"bye": True})
        self._thread.join(BEAT_SECONDS + 1.0)

    def _say(self, message: Message) -> None:
        with self._sending:
            self._line.send(message)

    def _run(self) -> None:
        verdict = self._listen()
        self._line.finish_sending()  # the hub waits until all have heard
        if verdict is None:
            return
        if verdict.process is not None and verdict.process.machine == self._process.machine:
            _kill(verdict.process)
        self._verdict = verdict
        self._decided.set()
        time.sleep(SECONDS_TO_END)
        self._on_verdict(verdict)

    def _listen(self) -> Verdict | None:
        """Until there is a verdict, or none is to be expected."""
        beat, heard = 0.0, time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._line, selectors.EVENT_READ)
            while True:
                before = time.monotonic()
                if before - beat >= BEAT_SECONDS:
                    beat = before
                    self._beat()
                is_told = selector.select(BEAT_SECONDS)
                now = time.monotonic()
                if now - before > BEAT_SECONDS + SLEPT_SECONDS:
                    heard += now - before
                if is_told:
                    try:
                        for message in self._line.receive():
                            if "verdict" in message:
                                return _verdict_of(message["verdict"])
                            if "over" in message:
                                return None
                    except (EOFError, ValueError):
                        if self._leaving:
                            return None
                        text = f"{self._hub} ended first, without a word: it was killed, crashed, or left by os._exit"
                        return Verdict(rank=0, text=text)
                    heard = now
                elif self._heartbeat is not None and now - heard >= self._heartbeat:
                    text = f"{self._hub} has not answered for {now - heard:.0f} s: it is stopped, or its machine is"
                    return Verdict(rank=0, text=text, process=self._hub)

    def _beat(self) -> None:
        position = self._position()
        self._say({"position": asdict(position)})
        if self._launcher is not None and os.getppid() != self._launcher:  # which can no longer end this rank
            self.report(f"what has started it (pid {self._launcher}) is gone", position.place, follows=False)
            self._launcher = None


def _verdict_of(told: Message) -> Verdict:
    process = told.pop("process")
    return Verdict(**told, process=None if process is None else Process(**process))


def this_process(rank: int) -> Process:
    """As its neighbours and the messages of others know it."""
    try:
        machine = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        machine = socket.gethostname()
    return Process(rank=rank, pid=os.getpid(), host=socket.gethostname(), machine=machine, began=_began(os.getpid()))


def _began(pid: int) -> int:
    """When a process began, in the kernel's ticks; 0 where there is no telling."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0


def _kill(process: Process) -> None:
    """End a process that does not end by itself: launchers wait for it, some for half a minute."""
    if process.pid != os.getpid() and _began(process.pid) == process.began:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except OSError as error:
            print(f"{process} cannot be killed: {error}", file=sys.stderr)
