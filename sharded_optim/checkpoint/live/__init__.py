"""Describe live models and optimizers, under every wrapper, as the `LocalTensor`s that checkpoints save and load.

model.py, optimizer.py      `LiveModel` and `LiveOptimizer`; they describe ordinary modules and this library's optimizers
zero.py, deepspeed.py       the same for `ShardedOptimizer`, and for DeepSpeed's engines
adapters.py                 registers these, and picks the one for a model or an optimizer
state_plan.py               load into an optimizer: plan the changes, then make them
"""

from __future__ import annotations

from sharded_optim.checkpoint.live.adapters import live_model, live_optimizer
from sharded_optim.checkpoint.live.model import LiveModel
from sharded_optim.checkpoint.live.optimizer import LiveOptimizer
from sharded_optim.checkpoint.live.state_plan import StatePlan, install_state, plan_state

__all__ = ["LiveModel", "LiveOptimizer", "StatePlan", "install_state", "live_model", "live_optimizer", "plan_state"]
