"""Messages between the watch of rank 0 and those of all ranks: a JSON object a line."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

__all__ = ["Line", "Message"]

Message = dict[str, Any]
RECEIVED_AT_ONCE = 65536  # bytes


class Line:
    """A connected socket that carries messages. Sending never waits long: a peer that does not read loses the line."""

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(1.0)
        self._socket = connected
        self._received = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Send, if there is still somebody to send to: that there is nobody is seen when receiving."""
        with suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Iterator[Message]:
        """What has arrived. To be called when there is something to read.

        Raises:
            EOFError: the other end is gone.
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
        for line in complete:
            yield json.loads(line)

    def finish_sending(self) -> None:
        """Tell the other end that nothing more comes. What was sent arrives, if what comes is read to its end."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()
