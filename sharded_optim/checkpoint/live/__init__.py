"""Live models and optimizers as checkpoints see them, under every wrapper, in terms of `LocalTensor`.

model.py, optimizer.py      `LiveModel` and `LiveOptimizer`, of ordinary modules and of this library's optimizers
state_plan.py               loading into an optimizer: a plan, and its execution
zero.py, deepspeed.py       of `ShardedOptimizer`, and of DeepSpeed's engines
adapters.py                 registers them, and picks one
"""

from __future__ import annotations

from sharded_optim.checkpoint.live.adapters import live_model, live_optimizer
from sharded_optim.checkpoint.live.model import LiveModel
from sharded_optim.checkpoint.live.optimizer import LiveOptimizer
from sharded_optim.checkpoint.live.state_plan import StatePlan, install_state, plan_state

__all__ = ["LiveModel", "LiveOptimizer", "StatePlan", "install_state", "live_model", "live_optimizer", "plan_state"]
