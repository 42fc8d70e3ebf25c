"""ZeRO-1 and ZeRO-2 around any model: `ShardedOptimizer`."""

from sharded_optim.zero.optimizer import ShardedOptimizer

__all__ = ["ShardedOptimizer"]
