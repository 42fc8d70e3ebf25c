"""Broadcast the address of rank 0's store to all ranks of an mpirun: `python -m launch.mpi_broadcast PORT [ADDRESS]`.

PORT is the store's port on rank 0, and 0 on other ranks. Address, port, world size and MPI library are printed as JSON. This is a separate
process, so that the rank itself never calls MPI: MPI may hang or abort, and MPICH's mpirun misses the failure of a rank if another rank
that had called MPI ended with exit status 0 before.
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
