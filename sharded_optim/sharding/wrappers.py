"""The registry of wrappers: each is a `Wrapper`, defined in a file of its own and listed in `WRAPPERS`.

Used by all code that describes tensors, prepares models or saves them: it asks every registered wrapper, and names none.
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

# Modules with a `WRAPPER`, in the order in which they are asked, each with a module that every user of the wrapper has imported. Unless it
# is imported, ours is not imported either, as that may take seconds.
WRAPPERS = {
    "sharded_optim.sharding.fsdp1": "torch.distributed.fsdp",
    "sharded_optim.sharding.fsdp2": "torch.distributed.fsdp",
    "sharded_optim.sharding.dtensor": "torch.distributed.tensor",
    "sharded_optim.sharding.ddp": "torch.nn.parallel",
    "sharded_optim.sharding.deepspeed": "deepspeed",
}

Tensors = Sequence[tuple[str, Sequence[int]]]  # their names and shapes
StepUnit = Callable[[Sequence[Tensor]], None]


@dataclass(frozen=True, kw_only=True)
class FlatModel:
    """A model whose parameters a wrapper has flattened, on this rank."""

    layout: FlatLayout
    order: Sequence[str]  # the names of the tensors that are flattened, on whatever ranks they are, in the order of the model
    aliases: Mapping[str, str]  # further names of these tensors, where modules share them, each with the name that `layout` has


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """The functions by which a wrapper describes its parameters and gradients. The defaults fit a wrapper that does not change them.

    Attributes:
        name: the wrapper's, for error messages.

        claims: whether a tensor, a parameter of a model, is one of the wrapper's.
        describe: (parameter that it claims, name) -> this rank's part of it. Raises ValueError if that cannot be determined.
        layout_holding: parameters, some of which it claims -> the layout of one wrapped model that holds all of them; None if there is no
            such model. The attribute is None for a wrapper that does not flatten, or that cannot be found from its parameters.
        partial: how a gradient is yet to be reduced over ranks, as an immutable value that can be pickled; None: not at all. Only called
            for gradients of layouts that have a tensor of a subclass.
        reduced: (gradient, parameter that it claims, the result of `partial`) -> the gradient, reduced. A collective: a rank without a
            gradient calls it with None, which it returns.

        inner: the name of the child that a module wraps, if it is one of the wrapper's modules. Names of tensors are without it.
        reshard: puts the parameters that optimizers have back into a model, if forward passes have left others in their places.
        flattened: the tensors that the wrapper has flattened into a parameter, for each such parameter of a model.
        content: (model, names of its parameters) -> this rank's part of it, if the wrapper has flattened parameters; else None. Raises
            ValueError if a checkpoint of the model cannot be made.

        units: parameters of a model whose gradients are reduced together, before autograd's post-accumulate hooks of them run. Parameters
            in no unit are each reduced alone. Raises ValueError if the hooks run too early.
        release: (model, optimized parameters, step) -> parameters that the wrapper steps by calls of `step` within backward, in its own
            hooks, and a function that removes these. `step` takes parameters with complete gradients and frees the gradients.
        is_in_forward: whether a forward pass of a model that it wraps runs now. Only for wrappers that must be applied before hooks are.
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
    """Return the first wrapper that claims a tensor."""
    return next((wrapper for wrapper in used_wrappers() if wrapper.claims(tensor)), NO_WRAPPER)


def partial_of(grad: Tensor | None, among: Iterable[Wrapper] | None = None) -> Any:
    """Return how a gradient still has to be reduced; None if it has not.

    Args:
        among: the wrappers to ask; None: all. Given for many gradients of a step, so that wrappers are looked up once.
    """
    if grad is None:
        return None
    partials = (wrapper.partial(grad) for wrapper in (used_wrappers() if among is None else among))
    return next((partial for partial in partials if partial is not None), None)
