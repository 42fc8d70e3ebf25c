"""Tells all ranks of an mpirun where rank 0's store is: `python -m launch.mpi_broadcast PORT [ADDRESS]`, PORT of rank 0 only, else 0.

A process of its own, so that MPI has nothing to do with the rank itself: MPI may hang or abort, and MPICH's mpirun forgets that a rank has
failed when another one that had called MPI left with exit status 0 before.
"""

from __future__ import annotations

import json
import socket
import sys


def main(arguments: list[str]) -> None:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    machine = world.Split_type(MPI.COMM_TYPE_SHARED)
    port, *given = arguments
    default = "127.0.0.1" if machine.size == world.size else socket.gethostname()
    address, port = world.bcast((given[0] if given else default, int(port)))
    library = MPI.Get_library_version().split(",")[0].strip()
    print(json.dumps({"address": address, "port": port, "world_size": world.size, "library": library}))


if __name__ == "__main__":
    main(sys.argv[1:])
