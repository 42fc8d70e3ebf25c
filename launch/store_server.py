"""Server of the rendezvous store, where no launcher has one: `python -m launch.store_server PORT PARENT`. Prints the port.

A process of its own: if rank 0 is stopped, the store must not stop, as the others detect that through it. The server ends when its parent,
rank 0, has ended in any way, and a little later, so that the others can detect that too.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

SECONDS_AFTER = 2.0
SECONDS_BETWEEN = 0.2


def main(arguments: list[str]) -> None:
    port, parent = map(int, arguments)
    try:
        store = TCPStore("localhost", port, is_master=True, timeout=timedelta(seconds=30), wait_for_workers=False)
    except RuntimeError as error:
        print(error, flush=True)
        sys.exit(1)
    print(store.port, flush=True)
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN)
    time.sleep(SECONDS_AFTER)


if __name__ == "__main__":
    main(sys.argv[1:])
