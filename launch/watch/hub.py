"""Where all ranks' watches report to: a thread of rank 0, which asks the judge and tells everyone the verdict."""

from __future__ import annotations

import selectors
import socket
import sys
import threading
import time
from dataclasses import asdict

from launch.watch.judge import Judge, Process, Verdict
from launch.watch.wire import Line

__all__ = ["Hub"]

ROUND_SECONDS = 0.2
PING_SECONDS = 1.0
DRAIN_SECONDS = 2.0  # for the others to read the last words


class Hub:
    """Listens at `port`, for members that know the secret.

    Args:
        judge: is told what is heard.
        secret: of this attempt: whoever else connects is not heard.
    """

    def __init__(self, judge: Judge, secret: str) -> None:
        self._judge = judge
        self._secret = secret
        self._listening = socket.create_server(("", 0), family=socket.AF_INET, backlog=4096)
        self.port: int = self._listening.getsockname()[1]
        self._ranks: dict[Line, int | None] = {}  # None: has not said yet
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch-hub", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let all ranks go, when rank 0 has done its work, or wait until they have heard the verdict."""
        self._over.set()
        self._thread.join(DRAIN_SECONDS + 2.0)

    def _run(self) -> None:
        pinged = 0.0
        while not self._over.is_set():
            self._hear(ROUND_SECONDS)
            now = time.monotonic()
            verdict = self._judge.verdict(now)
            if verdict is not None:
                self._pronounce(verdict)
                return
            if now - pinged >= PING_SECONDS:
                pinged = now
                self._tell({"ping": True})
        self._tell({"over": True})
        self._drain()

    def _hear(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._listening:
                line = Line(self._listening.accept()[0])
                self._ranks[line] = None
                self._selector.register(line, selectors.EVENT_READ)
            else:
                assert isinstance(key.fileobj, Line), "nothing else is registered"
                self._hear_one(key.fileobj)

    def _hear_one(self, line: Line) -> None:
        try:
            for message in line.receive():
                now = time.monotonic()
                rank = self._ranks[line]
                if rank is None:
                    if message.get("secret") != self._secret:
                        raise EOFError
                    process = Process(**message["process"])
                    self._ranks[line] = process.rank
                    self._judge.came(process, now)
                elif "counts" in message:
                    self._judge.heard(rank, message["counts"], message["place"], now)
                elif "failed" in message:
                    self._judge.failed(rank, message["failed"], message["place"], follows=message["follows"], now=now)
                elif "bye" in message:
                    self._judge.left(rank)
                    line.send({"over": True})
        except (EOFError, ValueError, KeyError, TypeError):
            rank = self._ranks.pop(line)
            self._selector.unregister(line)
            line.close()
            if rank is not None:
                self._judge.gone(rank, time.monotonic())

    def _pronounce(self, verdict: Verdict) -> None:
        """Rank 0's log has it before anybody ends, since some launchers end all when one has ended."""
        print(f"error: {verdict.text}", file=sys.stderr, flush=True)
        self._tell({"verdict": asdict(verdict)})
        self._drain()

    def _tell(self, message: dict[str, object]) -> None:
        for line in list(self._ranks):
            line.send(message)

    def _drain(self) -> None:
        """Read until the others have hung up: closing a socket with something unread takes back what was sent."""
        for line in list(self._ranks):
            line.finish_sending()
        until = time.monotonic() + DRAIN_SECONDS
        while any(rank is not None for rank in self._ranks.values()) and time.monotonic() < until:
            self._hear(ROUND_SECONDS)
