"""Find the address of this node, and whether it is the head node, for the options of torchrun in multi_node.sh.

`python launch/jobs/head_node.py 10.0.0.1` prints both, as `10.0.0.2 0`. torchrun would derive them from the host name, which on many
machines resolves to 127.0.1.1 or to an address outside of the head's network: no node would take itself for the head, and all would wait.
"""

from __future__ import annotations

import socket
import sys
import time

LOOK_UP_SECONDS = 60.0  # for a host name to appear: a container has none before it starts


def describe(head: str) -> tuple[str, bool | None]:
    """Return (address of this node, whether it is the head node); the second is None if all nodes are on one machine.

    Raises:
        OSError: the name of the head node does not resolve, or there is no route to it.
    """
    address = _look_up(head)
    if address.startswith("127."):  # the first node that opens the port becomes the head
        return head, None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 1))  # sends nothing: the system chooses the route, and with it this node's address
        own = probe.getsockname()[0]
    return own, own == address


def _look_up(head: str) -> str:
    deadline = time.monotonic() + LOOK_UP_SECONDS
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
