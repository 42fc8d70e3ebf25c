"""What multi_node.sh tells torchrun of this node: the address by which the others reach it, and whether it is the head.

`python launch/jobs/head_node.py 10.0.0.1` prints both, as `10.0.0.2 0`. torchrun would take them from the host name, which on many machines
leads to 127.0.1.1 or to another network than that of the head: then no node takes itself for the head, and all wait for it.
"""

from __future__ import annotations

import socket
import sys
import time

PATIENCE_SECONDS = 60.0  # with a name that does not exist yet: those of containers appear when they start


def describe(head: str) -> tuple[str, bool | None]:
    """(Address of this node, whether it is the head.) None lets torchrun see which of several on one machine opens the port first.

    Raises:
        OSError: there is no such head, or no way to it.
    """
    address = _look_up(head)
    if address.startswith("127."):
        return head, None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 1))  # sends nothing: the system chooses the way, and with it the address of this end
        own = probe.getsockname()[0]
    return own, own == address


def _look_up(head: str) -> str:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return socket.gethostbyname(head)
        except socket.gaierror as error:
            if time.monotonic() > deadline:
                raise OSError(f"HEAD_NODE={head!r}: {error}") from None
            time.sleep(1.0)


if __name__ == "__main__":
    node, is_head = describe(sys.argv[1])
    print(node, "" if is_head is None else int(is_head))
