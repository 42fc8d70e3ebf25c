"""Bytes that each rank sends in a step.

Of B bytes, by a ring of n ranks or directly: reduce-scatter and all-gather send (n - 1) / n * B, all-reduce twice that.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Collective", "Communication"]


@dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of a step that serve one purpose."""

    operation: str  # "all-gather", "reduce-scatter", "all-reduce" or "all-to-all"
    what: str  # is communicated
    ranks: int  # that take part in each
    in_shard_group: bool  # rather than across replicas, or over all ranks
    sent: int  # bytes, by each rank in a step; in an all-to-all, in the mean


@dataclass(frozen=True, kw_only=True)
class Communication:
    """Makes collectives of the ranks that train together."""

    world_size: int
    shards: int  # ranks of a shard group
    in_shard_group: bool  # whether shard groups are smaller than the world

    def reduce_scatter(self, what: str, shard_bytes: int) -> Collective:
        return self._of_shards("reduce-scatter", what, shard_bytes)

    def all_gather(self, what: str, shard_bytes: int) -> Collective:
        return self._of_shards("all-gather", what, shard_bytes)

    def _of_shards(self, operation: str, what: str, shard_bytes: int) -> Collective:
        sent = shard_bytes * (self.shards - 1)
        return Collective(operation=operation, what=what, ranks=self.shards, in_shard_group=self.in_shard_group, sent=sent)

    def all_to_all(self, what: str, sent: int) -> Collective:
        return Collective(operation="all-to-all", what=what, ranks=self.world_size, in_shard_group=False, sent=sent)

    def all_reduce(self, what: str, size: int, ranks: int) -> Collective:
        sent = -(-2 * (ranks - 1) * size // ranks)
        return Collective(operation="all-reduce", what=what, ranks=ranks, in_shard_group=False, sent=sent)
