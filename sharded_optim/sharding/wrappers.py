"""The registry of wrappers: each is a `Wrapper`, defined in a file of its own and listed in `WRAPPERS`.

All code that describes tensors, prepares models or saves them asks every registered wrapper, so that it need not name any.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from sharded_optim.sharding import plain
from sharded_optim.sharding.flat import FlatLayout
from sharded_optim.sharding.layout import LocalParam

__all__ = ["NO_WRAPPER", "WRAPPERS", "FlatModel", "StepUnit", "Tensors", "Wrapper", "partial_of", "used_wrappers", "wrapper_of"]

# The library's modules with a `WRAPPER`, in the order in which they are asked; each with a module that every user of the wrapper has
# imported. Ours is imported only if that one has been, as the import may take seconds.
WRAPPERS = {
    "sharded_optim.sharding.fsdp1": "torch.distributed.fsdp",
    "sharded_optim.sharding.fsdp2": "torch.distributed.fsdp",
    "sharded_optim.sharding.dtensor": "torch.distributed.tensor",
    "sharded_optim.sharding.ddp": "torch.nn.parallel",
    "sharded_optim.sharding.deepspeed": "deepspeed",
}

Tensors = Sequence[tuple[str, Sequence[int]]]  # (name, shape) of each tensor
StepUnit = Callable[[Sequence[Tensor]], None]


@dataclass(frozen=True, kw_only=True)
class FlatModel:
    """This rank's view of a model whose parameters a wrapper has flattened."""

    layout: FlatLayout
    order: Sequence[str]  # names of all flattened tensors, also those of other ranks, in the order of the model
    aliases: Mapping[str, str]  # further names of tensors that modules share, each with the tensor's name in `layout`


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """What the library needs to know about a wrapper, as functions. The defaults fit one that changes neither parameters nor gradients.

    Attributes:
        name: the wrapper's name in error messages.

        claims: (parameter) -> whether the parameter is one of the wrapper's.
        describe: (claimed parameter, its name) -> this rank's part of it. Raises ValueError if that cannot be determined.
        layout_holding: (parameters, some of which are claimed) -> the layout of one wrapped model that has all of them; None if there is no
            such model. The attribute is None if the wrapper does not flatten, or its model cannot be found from parameters.
        partial: (gradient) -> how it still has to be reduced over ranks, as an immutable value that can be pickled; None: not at all.
            Called when layouts are exchanged, and in the steps of layouts with tensors of other classes, such as DTensors.
        reduced: (gradient, claimed parameter, result of `partial`) -> the reduced gradient. A collective: a rank without a gradient calls
            it with None, and gets None.

        inner: (module) -> the name of the child that the module wraps, if it is one of the wrapper's modules; else None. The library's
            names of tensors leave it out.
        reshard: (model) puts the optimizer's parameters back into the model, if a forward pass has left others in their places.
        flattened: (model) -> for each flattened parameter, names and shapes of the tensors in it.
        content: (model, names of its parameters) -> this rank's view of the model, if the wrapper has flattened parameters; else None.
            Raises ValueError if a checkpoint of the model cannot be made.

        units: (model) -> groups of parameters whose gradients are reduced together, before autograd's post-accumulate hooks run on them.
            Any other parameter is reduced alone. Raises ValueError if the hooks run before the reduction.
        release: (model, optimized parameters, step) -> pairs of the parameters that the wrapper steps within backward, from its own hooks,
            and a function that stops this. `step` takes parameters with complete gradients, and frees the gradients.
        is_in_forward: () -> whether a forward pass of a wrapped model is running. Only for wrappers that must be applied before gradient
            release is prepared.
    """

    name: str

    claims: Callable[[Tensor], bool] = lambda tensor: False
    describe: Callable[[Any, str], LocalParam] = plain.describe
    layout_holding: Callable[[Sequence[Tensor]], FlatLayout | None] | None = None
    partial: Callable[[Tensor], Any] = lambda grad: None
    reduced: Callable[[Tensor | None, Tensor, Any], Tensor | None] = lambda grad, param, partial: grad

    inner: Callable[[nn.Module], str | None] = lambda module: None
    reshard: Callable[[nn.Module], None] = lambda model: None
    flattened: Callable[[nn.Module], Mapping[Tensor, Tensors]] = lambda model: {}
    content: Callable[[nn.Module, Mapping[Tensor, str]], FlatModel | None] = lambda model, names: None

    units: Callable[[nn.Module], Iterable[Sequence[Tensor]]] = lambda model: ()
    release: Callable[[nn.Module, AbstractSet[Tensor], StepUnit], Iterable[tuple[Collection[Tensor], Callable[[], None]]]] = (
        lambda model, optimized, step: ()
    )
    is_in_forward: Callable[[], bool] = lambda: False


NO_WRAPPER = Wrapper(name="no wrapper")


def used_wrappers() -> list[Wrapper]:
    """Return the registered wrappers whose packages this process has imported."""
    return [_wrapper_in(file) for file, used in WRAPPERS.items() if used in sys.modules]


@cache
def _wrapper_in(file: str) -> Wrapper:
    return import_module(file).WRAPPER


def wrapper_of(tensor: Tensor) -> Wrapper:
    """Return the first wrapper that claims a tensor; NO_WRAPPER if none does."""
    return next((wrapper for wrapper in used_wrappers() if wrapper.claims(tensor)), NO_WRAPPER)


def partial_of(grad: Tensor | None, among: Iterable[Wrapper] | None = None) -> Any:
    """Return how a gradient still has to be reduced (see `Wrapper.partial`); None if it is reduced.

    Args:
        among: the wrappers to ask, so that a caller with many gradients looks them up once; None: all used wrappers.
    """
    if grad is None:
        return None
    partials = (wrapper.partial(grad) for wrapper in (used_wrappers() if among is None else among))
    return next((partial for partial in partials if partial is not None), None)
