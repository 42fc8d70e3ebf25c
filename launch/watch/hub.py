"""Where all ranks' watches report to: a thread of rank 0, which asks the judge and tells everyone the verdict."""

from __future__ import annotations

import selectors
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict

from launch.watch.judge import Judge, Position, Process, Verdict
from launch.watch.wire import Line, Message, close_in_children

__all__ = ["Hub"]

ROUND_SECONDS = 0.2
PING_SECONDS = 1.0
SLEPT_SECONDS = 2.0  # that a round takes longer, and this process has not run
DRAIN_SECONDS = 2.0  # for the others to read the last words
SECONDS_FOR_GOODBYES = 60.0  # after rank 0's own, where no heartbeat limits them


class Hub:
    """Listens at `port`, for members that know the secret.

    Args:
        judge: is told what is heard.
        secret: of this attempt: whoever else connects is not heard.
    """

    def __init__(self, judge: Judge, secret: str) -> None:
        self._judge = judge
        self._secret = secret
        self._listening = _listening_socket()
        self.port: int = self._listening.getsockname()[1]
        self._ranks: dict[Line, int | None] = {}  # None: has not said yet
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._verdict: Verdict | None = None
        self._until = float("inf")
        self._thread = threading.Thread(target=self._run, name="watch-hub", daemon=True)
        self._thread.start()

    def close(self) -> Verdict | None:
        """Wait until all ranks have said goodbye, or have heard the verdict; which is returned."""
        self._until = time.monotonic() + SECONDS_FOR_GOODBYES
        self._thread.join()
        return self._verdict

    def _run(self) -> None:
        try:
            self._verdict = self._watch()
        except Exception:  # ranks must not take this for a stopped rank 0
            traceback.print_exc()
            print("error: the watch of rank 0 has failed, and ranks are not watched any more", file=sys.stderr, flush=True)
        if self._verdict is None:
            self._tell({"over": True})
        else:  # rank 0's log has it before anybody ends, since some launchers end all when one has ended
            print(f"error: {self._verdict.text}", file=sys.stderr, flush=True)
            self._tell({"verdict": asdict(self._verdict)})
        self._drain()

    def _watch(self) -> Verdict | None:
        pinged, before = 0.0, time.monotonic()
        while not self._judge.is_over and before < self._until:
            self._hear()
            now = time.monotonic()
            if now - before > ROUND_SECONDS + SLEPT_SECONDS:
                self._judge.slept(now - before)
            before = now
            verdict = self._judge.verdict(now)
            if verdict is not None:
                return verdict
            if now - pinged >= PING_SECONDS:
                pinged = now
                self._tell({"ping": True})
        return None

    def _hear(self) -> None:
        for key, _ in self._selector.select(ROUND_SECONDS):
            if isinstance(key.fileobj, Line):
                self._hear_one(key.fileobj)
            else:
                self._accept()

    def _accept(self) -> None:
        try:
            line = Line(self._listening.accept()[0])
        except OSError:  # it has hung up, or this process has too many open files
            time.sleep(ROUND_SECONDS)
            return
        self._ranks[line] = None
        self._selector.register(line, selectors.EVENT_READ)

    def _hear_one(self, line: Line) -> None:
        try:
            for message in line.receive():
                self._take(line, message)
        except Exception:  # its end, or nonsense from a stranger
            rank = self._ranks.pop(line)
            self._selector.unregister(line)
            line.close()
            if rank is not None:
                self._judge.gone(rank, time.monotonic())

    def _take(self, line: Line, message: Message) -> None:
        now = time.monotonic()
        rank = self._ranks[line]
        if rank is None:
            if message["secret"] != self._secret:
                raise ValueError("it does not know the secret")
            process = Process(**message["process"])
            self._ranks[line] = process.rank
            self._judge.came(process, now)
        elif "position" in message:
            self._judge.heard(rank, Position(**message["position"]), now)
        elif "failed" in message:
            self._judge.failed(rank, message["failed"], message["place"], follows=message["follows"], now=now)
        elif "bye" in message:
            self._judge.left(rank)
            line.send({"over": True})

    def _tell(self, message: Message) -> None:
        for line, rank in list(self._ranks.items()):
            if rank is not None:
                line.send(message)

    def _drain(self) -> None:
        """Read until the others have hung up: closing a socket with something unread takes back what was sent."""
        for line in list(self._ranks):
            line.finish_sending()
        until = time.monotonic() + DRAIN_SECONDS
        while any(rank is not None for rank in self._ranks.values()) and time.monotonic() < until:
            self._hear()


def _listening_socket() -> socket.socket:
    """At any free port, for IPv4 and IPv6, where the machine has both."""
    both = socket.has_dualstack_ipv6()
    try:
        listening = socket.create_server(("", 0), family=socket.AF_INET6 if both else socket.AF_INET, backlog=4096, dualstack_ipv6=both)
    except OSError:  # IPv6 is compiled in and switched off
        listening = socket.create_server(("", 0), backlog=4096)
    listening.setblocking(False)
    close_in_children(listening)
    return listening
