"""The process groups over which shards and replicas are spread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sharded_optim.sharding.ranks import own_process_group

__all__ = ["Topology"]


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The process groups of a ShardedOptimizer. All but `given` are the library's own, or None if this process is alone in the group.

    Attributes:
        given: the ranks that train the model: the user's process group, or a new one for a 2-D mesh; None: the world.
        all_ranks: the library's own group of the ranks in `given`.
        shard_group: the ranks over which a bucket is sharded.
        replica_group: the ranks that hold the same shard as this one; None without a mesh of replicas.
        replicas: the number of ranks in the replica group, or 1.
    """

    given: dist.ProcessGroup | None
    all_ranks: dist.ProcessGroup | None
    shard_group: dist.ProcessGroup | None
    replica_group: dist.ProcessGroup | None
    replicas: int

    @classmethod
    def of(cls, process_group: dist.ProcessGroup | DeviceMesh | None) -> Topology:
        """Build the groups from a process group, or from a mesh of shards or of (replicas, shards), as for `fully_shard`. A collective.

        Raises:
            ValueError: the mesh has neither one nor two dimensions, or this rank is not in it.
        """
        given: Any = process_group
        shard_group, replica_group = given, None
        if isinstance(process_group, DeviceMesh):
            mesh = process_group
            if mesh.ndim not in (1, 2) or mesh.get_coordinate() is None:
                raise ValueError(
                    f"process_group={mesh} must be a mesh that this rank is in, of 1 dimension (shards) or 2 (replicas, shards); make one "
                    f"with init_device_mesh(device, (replicas, shards))"
                )
            shard_group = given = mesh.get_group(mesh.ndim - 1)
            if mesh.ndim == 2:
                replica_group = own_process_group(mesh.get_group(0))
                ranks = sorted(mesh.mesh.flatten().tolist())
                given = None if len(ranks) == dist.get_world_size() else dist.new_group(ranks, use_local_synchronization=True)
        return cls(
            given=given,
            all_ranks=own_process_group(given),
            shard_group=own_process_group(shard_group),
            replica_group=replica_group,
            replicas=1 if replica_group is None else dist.get_world_size(replica_group),
        )
