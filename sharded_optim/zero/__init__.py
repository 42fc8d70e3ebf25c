"""ZeRO-1 and ZeRO-2 around any model: `ShardedOptimizer`."""

from sharded_optim.zero.forward import finish_gathering
from sharded_optim.zero.optimizer import ShardedOptimizer

__all__ = ["ShardedOptimizer", "finish_gathering"]
