"""What checkpoints see of models and optimizers under each wrapper: one file per wrapper, all in the terms of `held.py`.

`model.py` knows the wrappers that are registered in `sharding/wrappers.py`, `optimizer.py` every optimizer of this library, `zero.py`
ShardedOptimizer and `deepspeed.py` DeepSpeed's engines. `live_model` and `live_optimizer` pick by what they are given.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from sharded_optim.checkpoint.live import zero
from sharded_optim.checkpoint.live.model import LiveModel
from sharded_optim.checkpoint.live.optimizer import LiveOptimizer
from sharded_optim.step.engine import Engine
from sharded_optim.zero import ShardedOptimizer

__all__ = ["LiveModel", "LiveOptimizer", "live_model", "live_optimizer"]


def live_model(model: Any) -> LiveModel:
    """What a model holds.

    Args:
        model: a module under any wrapper, or a DeepSpeedEngine; None: nothing.

    Raises:
        TypeError: it is neither.
        ValueError: it does not tell what it holds.
    """
    if model is None:
        return LiveModel()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or a DeepSpeedEngine, got {type(model).__name__}")
    if is_deepspeed_engine(model):
        from sharded_optim.checkpoint.live import deepspeed

        return deepspeed.live_model(model)
    return LiveModel.of(model)


def live_optimizer(optimizer: Any, model: Any, shown: LiveModel) -> LiveOptimizer:
    """What an optimizer holds.

    Args:
        optimizer: one of this library, or what Accelerate or DeepSpeed have made of one.
        model: whose parameters it steps, and whose names for them are used; None: the optimizer's own names.
        shown: what the model holds.

    Raises:
        TypeError: it is of another library.
        ValueError: it does not tell what it holds.
    """
    inner = optimizer
    while not isinstance(inner, Engine | ShardedOptimizer) and getattr(inner, "optimizer", None) is not None:
        inner = inner.optimizer
    if isinstance(inner, ShardedOptimizer):
        return zero.live_optimizer(inner, shown)
    if not isinstance(inner, Engine):
        raise TypeError(
            f"optimizer must be one of this library (so.StableAdamW, so.ShardedOptimizer, ...), got {type(optimizer).__qualname__}; the "
            f"state of others is imported with `sharded-optim checkpoint import`"
        )
    if is_deepspeed_engine(model):
        from sharded_optim.checkpoint.live import deepspeed

        return deepspeed.live_optimizer(model, inner, shown)
    if inner.layout is not None and inner.layout.steps_by_group:
        raise ValueError("under DeepSpeed pass the engine, which knows the param groups, as model=, beside optimizer=")
    return LiveOptimizer.of(inner, shown)


def is_deepspeed_engine(model: Any) -> bool:
    """Without importing DeepSpeed."""
    module = sys.modules.get("deepspeed.runtime.engine")
    return module is not None and isinstance(model, module.DeepSpeedEngine)
