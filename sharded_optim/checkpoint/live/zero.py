"""Reads a `ShardedOptimizer`: its shards, under the names of the model's parameters."""

from __future__ import annotations

from typing import Any

from sharded_optim.checkpoint.live.adapters import Adapter
from sharded_optim.checkpoint.live.model import LiveModel
from sharded_optim.checkpoint.live.optimizer import LiveOptimizer, LiveParam, renamed
from sharded_optim.step.param_groups import named_params
from sharded_optim.zero import ShardedOptimizer

__all__ = ["ADAPTER"]


def live_optimizer(optimizer: Any, _: Any, live: LiveModel) -> LiveOptimizer | None:
    """As `LiveOptimizer.of`, for a ShardedOptimizer."""
    if not isinstance(optimizer, ShardedOptimizer):
        return None
    housing = optimizer._housing
    params, group_of = [], {}
    for index, group in enumerate(optimizer.param_groups):
        for param, own_name in named_params(group, index):
            name = live.names.get(param, own_name)
            group_of[name] = index
            home = housing.homes.get(param)
            if home is not None and home.local is not None:
                local = renamed(housing.layout.describe(home.local, home.name), name)
                params.append(LiveParam(param=home.local, group=index, local=local, is_master=home.kind.has_masters))

    def round_masters() -> None:
        for bucket in housing.buckets:
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
