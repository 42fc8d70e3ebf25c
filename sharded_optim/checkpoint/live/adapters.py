"""The registry of adapters: an `Adapter` for each kind of model and optimizer, each in its own file.

Used by saving, loading and `tools/divergence.py`, which know no wrapper by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from sharded_optim.checkpoint.live.model import LiveModel
from sharded_optim.checkpoint.live.optimizer import LiveOptimizer

__all__ = ["ADAPTERS", "Adapter", "live_model", "live_optimizer"]

# Modules with an `ADAPTER`, in the order in which they are tried -> a module that is imported if the adapter's wrapper is in use.
ADAPTERS = {
    "sharded_optim.checkpoint.live.zero": "sharded_optim.zero",
    "sharded_optim.checkpoint.live.deepspeed": "deepspeed.runtime.engine",
    "sharded_optim.checkpoint.live.adapters": "sharded_optim",
}


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Functions that describe one kind of model or optimizer, and return None for other kinds.

    Attributes:
        model: (module) -> this process's part of the model. Raises ValueError if that cannot be determined.
        optimizer: (optimizer, its model or None, this process's part of the model) -> this process's part of the optimizer.
    """

    model: Callable[[nn.Module], LiveModel | None] = lambda model: None
    optimizer: Callable[[Any, Any, LiveModel], LiveOptimizer | None] = lambda optimizer, model, live: None


ADAPTER = Adapter(model=LiveModel.of, optimizer=LiveOptimizer.of)


def _adapters() -> Iterator[Adapter]:
    return (import_module(file).ADAPTER for file, wrapper in ADAPTERS.items() if wrapper in sys.modules)


def live_model(model: Any) -> LiveModel:
    """Describe the elements of a model that this process holds.

    Args:
        model: a module under any wrapper, or a DeepSpeedEngine; None: there is no model.

    Raises:
        TypeError: the model is none of these.
        ValueError: the elements that this process holds cannot be determined.
    """
    if model is None:
        return LiveModel()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or a DeepSpeedEngine, got {type(model).__name__}")
    return next(live for adapter in _adapters() if (live := adapter.model(model)) is not None)


def live_optimizer(optimizer: Any, model: Any, live: LiveModel) -> LiveOptimizer:
    """Describe the state of an optimizer that this process holds.

    Args:
        optimizer: an optimizer of this library, or an object of Accelerate or DeepSpeed that has one as its attribute `optimizer`.
        model: the model whose parameters the optimizer steps; its names are used. None: the optimizer's own names.
        live: the part of the model that this process holds.

    Raises:
        TypeError: the optimizer belongs to another library.
        ValueError: the part that this process holds cannot be determined.
    """
    candidate = optimizer
    while candidate is not None:
        for adapter in _adapters():
            state = adapter.optimizer(candidate, model, live)
            if state is not None:
                return state
        candidate = getattr(candidate, "optimizer", None)
    raise TypeError(
        f"optimizer must be one of this library (so.StableAdamW, so.ShardedOptimizer, ...), got {type(optimizer).__qualname__}; the "
        f"state of others is imported with `sharded-optim checkpoint import`"
    )
