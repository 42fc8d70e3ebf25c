"""Messages between the watch of rank 0 and those of all ranks: a JSON object a line."""

from __future__ import annotations

import json
import os
import socket
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

__all__ = ["Line", "Message", "close_in_children"]

Message = dict[str, Any]
RECEIVED_AT_ONCE = 65536  # bytes


LONGEST = 2**20  # bytes of a message


def close_in_children(connection: socket.socket) -> None:
    """Have processes that this one forks close a socket, as it would otherwise stay open when this process is gone."""
    known = weakref.ref(connection)

    def close() -> None:
        inherited = known()
        if inherited is not None:
            inherited.close()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=close)


class Line:
    """A connected socket that carries messages. Sending never waits long: to a peer that does not read, nothing more is sent."""

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(1.0)
        self._socket = connected
        self._received = b""
        self._is_open = True
        close_in_children(connected)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Send, if there is still somebody to send to: that there is nobody is seen when receiving."""
        if self._is_open:
            try:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                self._is_open = False  # half a message may have been sent

    def receive(self) -> Iterator[Message]:
        """What has arrived. To be called when there is something to read.

        Raises:
            EOFError: the other end is gone.
            ValueError: it does not send messages.
        """
        try:
            content = self._socket.recv(RECEIVED_AT_ONCE)
        except TimeoutError:
            return
        except OSError as error:
            raise EOFError from error
        if not content:
            raise EOFError
        *complete, self._received = (self._received + content).split(b"\n")
        if len(self._received) > LONGEST:
            raise ValueError(f"a message is longer than {LONGEST} bytes")
        for line in complete:
            message = json.loads(line)
            if not isinstance(message, dict):
                raise ValueError(f"a message is an object, got {message!r}")
            yield message

    def finish_sending(self) -> None:
        """Tell the other end that nothing more comes. What was sent arrives, if what comes is read to its end."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()
