"""Ranks started by mpirun: rank 0 serves torch's store, and mpi4py tells the others where. Trains as pytorch_fsdp2.py.

This is for one machine; launch/rendezvous.py and docs/launching.md have what several machines and failing ranks need.
"""

import torch.distributed as dist
from mpi4py import MPI

import common
from pytorch_fsdp2 import train


def join_ranks() -> None:
    world = MPI.COMM_WORLD
    store = dist.TCPStore("127.0.0.1", 0, world.size, is_master=True, wait_for_workers=False) if world.rank == 0 else None
    port = world.bcast(store.port if store is not None else None)
    store = store or dist.TCPStore("127.0.0.1", port, world.size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)


if __name__ == "__main__":
    if common.is_rank():
        join_ranks()
    common.main(train, launcher=common.MPIRUN)
