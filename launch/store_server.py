"""Serves the store by which ranks meet, where no launcher does: `python -m launch.store_server PORT PARENT`. Prints the port.

A process of its own: a rank 0 that is stopped must not stop the store, by which the others learn of it. It ends with its parent, rank 0,
however that ends, and a little later, so that the others learn of that too.
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
