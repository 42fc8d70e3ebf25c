"""Build the parts of a user's training run: the model, the optimizer, and the loss of a batch.

All arguments of the user must be picklable, as ranks are new processes.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import pickle
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sharded_optim.sharding.names import without_wrappers

__all__ = ["MakeOptimizer", "check_picklable", "loss_of", "named", "rebuilt", "seed_all", "seeded", "trainable"]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name; a shared parameter occurs once."""
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by their names without the prefixes of FSDP1, torch.compile and activation checkpointing."""
    return {without_wrappers(name, is_in_ddp=False): param for name, param in trainable(model).items()}


def seed_all(number: int) -> None:
    """Seed the random numbers of torch, Python and NumPy."""
    torch.manual_seed(number)
    random.seed(number)
    numpy.random.seed(number)


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a model with random numbers from a seed, on the CPU."""
    seed_all(seed)
    return build().to("cpu")


def rebuilt(optimizer: Optimizer, make: MakeOptimizer, params_of_groups: Sequence[Sequence[Tensor]]) -> Optimizer:
    """Build a copy of an optimizer that has not stepped yet, with other parameters in its groups; empty groups are left out."""
    groups: list[dict[str, Any]] = [
        {**({} if make.constructor else _hyperparameters(group)), "params": [*params]}
        for group, params in zip(optimizer.param_groups, params_of_groups, strict=True)
        if params
    ]
    if make.constructor is not None:
        return make.given(groups)
    kind = type(optimizer)
    try:
        return kind(groups)  # pyright: ignore[reportCallIssue]
    except TypeError:  # an argument without a default
        accepted = inspect.signature(kind).parameters
        return kind(groups, **{key: value for key, value in optimizer.defaults.items() if key in accepted})  # pyright: ignore[reportCallIssue]


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({key: value for key, value in group.items() if key != "params"})


@dataclass(frozen=True)
class MakeOptimizer:
    """Builds an optimizer.

    Attributes:
        given: a class of torch.optim.Optimizer or a functools.partial of one, which is called with a model's trainable parameters; or
            another callable, which is called with the model.
    """

    given: Callable[..., Any]

    def __call__(self, model: nn.Module) -> Optimizer:
        return self.given(model if self.constructor is None else list(trainable(model).values()))

    @property
    def constructor(self) -> type[Optimizer] | None:
        """The optimizer class; None for a callable that takes the model."""
        function = self.given
        while isinstance(function, functools.partial):
            function = function.func
        return function if isinstance(function, type) and issubclass(function, Optimizer) else None

    @property
    def keywords(self) -> dict[str, Any]:
        """The hyperparameters that a partial binds."""
        return dict(self.given.keywords) if isinstance(self.given, functools.partial) else {}

    @property
    def name(self) -> str:
        given: Any = self.constructor or self.given
        return getattr(given, "path", None) or f"{given.__module__.split('.')[0]}.{getattr(given, '__qualname__', type(given).__name__)}"


def check_picklable(**given: Any) -> None:
    """Check that values can be sent to another process.

    Raises:
        ValueError: a value cannot be sent. The message names the argument.
    """
    main = sys.modules.get("__main__")
    for name, value in given.items():
        if getattr(value, "__module__", None) == "__main__" and not os.path.exists(getattr(main, "__file__", "")):
            raise ValueError(f"{name} is defined where other processes cannot find it, as in a notebook; put it into a module")
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
        batch: the model's keyword arguments as a mapping, its positional arguments as a list or tuple, or a single argument.

    Returns:
        The output's `loss`; if it has none, the first tensor of one number in the output; if there is none, the mean square of the first
        tensor.
    """
    if isinstance(batch, Mapping):
        output = model(**batch)
    elif isinstance(batch, list | tuple):
        output = model(*batch)
    else:
        output = model(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    found = list(_tensors(output))
    if not found:
        raise ValueError(f"the model returned a {type(output).__name__} without a loss; return a tensor, or an output with `loss`")
    numbers = [tensor for tensor in found if tensor.numel() == 1]
    return numbers[0].squeeze() if numbers else found[0].float().square().mean()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.requires_grad:
            yield output
    elif isinstance(output, Mapping) or is_dataclass(output):
        for each in (output if isinstance(output, Mapping) else vars(output)).values():
            yield from _tensors(each)
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for each in output:
            yield from _tensors(each)
