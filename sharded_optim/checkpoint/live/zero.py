"""Adapter of a `ShardedOptimizer`: its shards, under the names of the model's parameters."""

from __future__ import annotations

from typing import Any

from sharded_optim.checkpoint.live.adapters import Adapter
from sharded_optim.checkpoint.live.model import LiveModel
from sharded_optim.checkpoint.live.optimizer import LiveOptimizer, LiveParam, renamed
from sharded_optim.step.param_groups import named_params
from sharded_optim.zero import ShardedOptimizer

__all__ = ["ADAPTER"]


def live_optimizer(optimizer: Any, _: Any, live: LiveModel) -> LiveOptimizer | None:
    """Describe a ShardedOptimizer; None for any other optimizer, which `LiveOptimizer.of` describes."""
    if not isinstance(optimizer, ShardedOptimizer):
        return None
    bucket_layout = optimizer._bucket_layout
    params, group_of = [], {}
    for index, group in enumerate(optimizer.param_groups):
        for param, own_name in named_params(group, index):
            name = live.names.get(param, own_name)
            group_of[name] = index
            slot = bucket_layout.slots.get(param)
            if slot is not None and slot.local is not None:
                local = renamed(bucket_layout.layout.describe(slot.local, slot.name), name)
                params.append(LiveParam(param=slot.local, group=index, local=local, is_master=slot.kind.has_masters))

    def round_masters() -> None:
        for bucket in bucket_layout.buckets:
            bucket.round_masters()

    return LiveOptimizer(
        engine=optimizer._engine,
        params=params,
        groups=optimizer.param_groups,
        group_of=group_of,
        synchronize=optimizer.wait,
        after_load=round_masters,
    )


ADAPTER = Adapter(optimizer=live_optimizer)
