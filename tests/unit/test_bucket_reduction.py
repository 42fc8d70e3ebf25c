"""The reduction of buckets of `ShardedOptimizer`, where a wait for other ranks fails and is repeated."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sharded_optim.zero import bucket_reduction
from sharded_optim.zero.transfers import Transfer


class Late:
    """Work whose first waits fail, as where another rank arrives after the timeout."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def wait(self) -> None:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("timed out")


class ShardGroup:
    """Of one rank, whose transfer of the bucket `late` fails once."""

    scratch_shards, shared_memory = 0, SimpleNamespace(exist=True)

    def __init__(self, late: int) -> None:
        self._late = late

    def zeros(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.zeros(numel, dtype=dtype, device=device)

    def reduce_scatter(self, full: torch.Tensor, shard: torch.Tensor, *, what: str, place: int, **_: Any) -> Transfer:
        return Transfer(what, [Late(int(place == self._late))], lambda: shard.copy_(full))


class Hashable(SimpleNamespace):
    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return id(self)


def bucket_of(number: int) -> Any:
    slot = Hashable(param=torch.zeros(4), name=f"w{number}", whole_in_bucket=slice(0, 4))
    kind = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    sizes = {"numel": 4, "shard_numel": 4, "pad": slice(4, 4)}
    slot.bucket = SimpleNamespace(
        number=number, named=f"bucket {number}", slots=[slot], kind=kind, contents=None, grads=torch.zeros(4), has_gradient=False, **sizes
    )
    return slot.bucket


@pytest.mark.parametrize("late", range(4))
@pytest.mark.parametrize("has_replicas", [False, True])
def test_a_wait_that_fails_is_repeated_and_replicas_are_reduced_in_order(
    late: int, has_replicas: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket that was dropped would keep the gradient of an earlier step, and shift the collectives of the replicas."""
    reduced_over_replicas = []

    def all_reduce(shard: torch.Tensor, group: Any, what: str) -> Transfer:
        reduced_over_replicas.append(what.split()[-1])
        return Transfer(what, [Late(0)])

    monkeypatch.setattr(bucket_reduction.transfers, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 1)
    topology: Any = SimpleNamespace(replica_group=object() if has_replicas else None, all_ranks=object())
    shard_group: Any = ShardGroup(late)
    reducer = bucket_reduction.BucketReducer(topology, shard_group, keeps_contents=False, reduce_dtype=None)
    buckets = [bucket_of(number) for number in range(4)]
    failures = 0
    for number, bucket in enumerate(buckets):
        reducer.fill(bucket.slots[0], torch.full((4,), number + 1.0), adds=False)
        try:
            reducer.launch(bucket, {bucket.slots[0]}, 1)
        except RuntimeError:
            failures += 1
    for _ in range(2):
        try:
            reducer.finish()
            break
        except RuntimeError:
            failures += 1
    assert failures == 1
    assert [bucket.grads[0].item() for bucket in buckets] == [1.0, 2.0, 3.0, 4.0]
    assert reduced_over_replicas == (["0", "1", "2", "3"] if has_replicas else [])
