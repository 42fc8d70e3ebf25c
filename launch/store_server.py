"""Serve the rendezvous store where the launcher has none: `python -m launch.store_server PORT PARENT`, which prints the port.

The server is a separate process: through its store the other ranks detect that rank 0 is stopped, so the store must go on then. It ends
two seconds after its parent, rank 0, has ended in any way, so that the other ranks can detect that too.
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
