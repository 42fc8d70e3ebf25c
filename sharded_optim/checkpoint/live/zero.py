"""What a ShardedOptimizer holds: its shards, under the names of the model's parameters."""

from __future__ import annotations

from sharded_optim.checkpoint.live.model import LiveModel
from sharded_optim.checkpoint.live.optimizer import LiveOptimizer, Member, renamed
from sharded_optim.step.param_groups import named_params
from sharded_optim.zero import ShardedOptimizer

__all__ = ["live_optimizer"]


def live_optimizer(optimizer: ShardedOptimizer, model: LiveModel) -> LiveOptimizer:
    """As `live.live_optimizer`.

    Args:
        model: whose names are used; of other parameters the optimizer's own, or their position.
    """
    housing = optimizer._housing
    members, group_of = [], {}
    for index, group in enumerate(optimizer.param_groups):
        for param, own_name in named_params(group, index):
            name = model.names.get(param, own_name)
            group_of[name] = index
            home = housing.homes.get(param)
            if home is not None and home.local is not None:
                local = renamed(housing.layout.describe(home.local, home.name), name)
                members.append(Member(param=home.local, group=index, local=local, is_master=home.kind.has_masters))

    def loaded() -> None:
        for bucket in housing.buckets:
            bucket.round_masters()

    return LiveOptimizer(
        engine=optimizer._engine,
        members=members,
        groups=optimizer.param_groups,
        group_of=group_of,
        settle=optimizer.wait,
        loaded=loaded,
    )
