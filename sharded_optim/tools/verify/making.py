"""What a user gives to build a training run: a model, batches, an optimizer; and the loss of what a model returns.

All of it must be picklable, as ranks are new processes.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sharded_optim.sharding.names import names_without_wrappers

__all__ = ["MakeOptimizer", "check_picklable", "loss_of", "named", "seeded", "trainable"]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that an optimizer is to step, each once."""
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return `trainable` by the names without the prefixes of wrappers."""
    params = trainable(model)
    return {short: params[name] for name, short in names_without_wrappers(params).items()}


@dataclass(frozen=True)
class MakeOptimizer:
    """Builds an optimizer.

    Attributes:
        given: a class of torch.optim.Optimizer or a functools.partial of one, which is called with a model's trainable parameters; or
            another callable, which is called with the model.
    """

    given: Callable[..., Any]

    def __call__(self, model: nn.Module) -> Optimizer:
        return self.of_groups([{"params": list(trainable(model).values())}]) if self.constructor is not None else self.given(model)

    @property
    def constructor(self) -> type[Optimizer] | None:
        """The class, or None for a callable that takes the model."""
        function = self.given
        while isinstance(function, functools.partial):
            function = function.func
        return function if isinstance(function, type) and issubclass(function, Optimizer) else None

    @property
    def keywords(self) -> dict[str, Any]:
        """The hyperparameters that a partial binds."""
        return dict(self.given.keywords) if isinstance(self.given, functools.partial) else {}

    def of_groups(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Build an optimizer of the class for these param groups."""
        return self.given(groups)

    @property
    def name(self) -> str:
        named = self.constructor or self.given
        return f"{named.__module__.split('.')[0]}.{getattr(named, '__qualname__', type(named).__name__)}"


def check_picklable(**given: Any) -> None:
    """Raise an error for what cannot be sent to another process.

    Raises:
        ValueError: names the argument.
    """
    for name, value in given.items():
        try:
            pickle.dumps(value)
        except Exception as error:  # whatever a value's own pickling raises
            raise ValueError(
                f"{name} is sent to processes of its own, and {value!r} cannot be pickled ({error}); give a function or class that a "
                f"module defines, or a functools.partial of one"
            ) from None


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """Run a model's forward pass, and return a loss.

    Args:
        batch: keyword arguments as a mapping, positional ones as a list or tuple, or the only argument.

    Returns:
        What the model returns under `loss`; the output itself if it is one number; else the mean of the squares of the first tensor in it.
    """
    if isinstance(batch, Mapping):
        output = model(**batch)
    elif isinstance(batch, list | tuple):
        output = model(*batch)
    else:
        output = model(batch)
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        return output["loss"]
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    found = next(_tensors(output), None)
    if found is None:
        raise ValueError(f"the model returned a {type(output).__name__} without a loss; return a tensor, or an output with `loss`")
    return found.squeeze() if found.numel() == 1 else found.float().square().mean()


def _tensors(output: Any) -> Any:
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.requires_grad:
            yield output
    elif isinstance(output, Mapping):
        for each in output.values():
            yield from _tensors(each)
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for each in output:
            yield from _tensors(each)


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a model with torch's random numbers from a seed."""
    torch.manual_seed(seed)
    return build()
