"""The step inside backward: a parameter is stepped, and its gradient freed, as soon as the gradient is complete.

Parameters that are stepped together are a unit. Each wrapper's file in `sharding/` defines its units:

    plain model     one parameter, in autograd's post-accumulate hook
    FSDP2           the parameters of one `fully_shard` call: FSDP reduces them together and then calls the hook of each
    DDP             a bucket, in a communication hook: one is reduced while the one before is stepped

A step of a unit is an ordinary step of its parameters alone, so an algorithm with a statistic has one all-reduce per unit. Wrappers
complete units in the same order on every rank, or their own collectives would not match; the steps follow that order.

Peak memory of gradients falls from the whole model's to about one unit's. DDP's buckets stay allocated, as DDP owns them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from sharded_optim.sharding import used_wrappers
from sharded_optim.sharding.hooks import InertHook
from sharded_optim.step.engine import Engine
from sharded_optim.step.state import local_of

__all__ = ["prepare_for_gradient_release", "remove_gradient_release"]

Unit = tuple[Tensor, ...]

# Keeps optimizers alive as long as their models. Hooks do not: Python cannot collect a cycle through autograd.
_prepared: WeakKeyDictionary[nn.Module, tuple[Engine, list[Callable[[], None]]]] = WeakKeyDictionary()


def prepare_for_gradient_release(model: nn.Module, optimizer: torch.optim.Optimizer, ignore_existing_hooks: bool = False) -> None:
    """Step the parameters of `model` inside backward from now on, and free their gradients.

    `optimizer.step()` and `optimizer.zero_grad()` then find no gradients and may stay in the loop, on every rank or on none. Nothing that
    needs all gradients at once works with it: clipping their norm, GradScaler, several backward passes before a step (but see
    `optimizer.optimizer_accumulation`, and `no_sync` or `set_requires_gradient_sync` of the wrappers). `nonfinite="skip"` skips only the
    units that are not finite, not the whole step.

    Args:
        model: plain, wrapped in DistributedDataParallel, or with FSDP2's `fully_shard` applied; wrapped before this call.
        optimizer: of this library, built with `gradient_release=True`, over the parameters of `model`.
        ignore_existing_hooks: whether parameters may already have post-accumulate-grad hooks.

    Raises:
        TypeError: an optimizer of another library.
        ValueError: the optimizer was built without `gradient_release=True`, hooks exist already, or the wrapper does not support it.
    """
    if not isinstance(optimizer, Engine):
        raise TypeError(f"gradient release needs an optimizer of sharded_optim, got {type(optimizer).__name__}")
    if not optimizer.gradient_release:
        raise ValueError("the optimizer was not built for gradient release; pass gradient_release=True")
    if model in _prepared:
        raise ValueError("the model is already prepared for gradient release; call remove_gradient_release first")
    optimized = {param for group in optimizer.param_groups for param in group["params"]}
    names = {param: name for name, param in model.named_parameters() if param.requires_grad and param in optimized}
    if not names:
        raise ValueError("the optimizer has no trainable parameter of the model; build it from the model's parameters, after wrapping")
    for param, name in names.items():
        if getattr(param, "_post_accumulate_grad_hooks", None) and not ignore_existing_hooks:
            raise ValueError(f"parameter {name!r} has a post-accumulate-grad hook already; pass ignore_existing_hooks=True to have both")
    used = used_wrappers()
    reduced_together = [unit for wrapper in used for unit in wrapper.units(model)]  # first, as it may raise: nothing has changed yet

    removers: list[Callable[[], None]] = []
    hooked = list(names)
    for wrapper in used:
        for released, remove in wrapper.release(model, optimized, partial(_step_and_free, optimizer)):
            removers.append(remove)
            hooked = [param for param in hooked if param not in released]
    units = _Units(optimizer, _units_of(hooked, reduced_together))
    removers += [param.register_post_accumulate_grad_hook(units.complete).remove for param in hooked]
    if hooked:
        plain = [param for param in hooked if type(param) is nn.Parameter]  # FSDP2 replaces its parameters in every forward
        removers.append(model.register_forward_pre_hook(_RefuseLaterWrapping(plain)).remove)
    _prepared[model] = (optimizer, removers)


def remove_gradient_release(model: nn.Module) -> None:
    """Undo `prepare_for_gradient_release`: backward leaves gradients again, and `optimizer.step()` uses them.

    A DistributedDataParallel keeps its communication hook, which then only averages; wrap the model anew to overlap that with backward.
    """
    if model not in _prepared:
        warnings.warn("the model is not prepared for gradient release; nothing to remove", UserWarning, stacklevel=2)
        return
    _, removers = _prepared.pop(model)
    for remove in removers:
        remove()


class _Units:
    """Collects parameters with complete gradients, and steps a unit when all of it are there, the next one begins, or backward ends."""

    def __init__(self, optimizer: Engine, units: Iterable[Unit]) -> None:
        self._optimizer = ref(optimizer)
        self._unit_of = {id(param): (number, len(unit)) for number, unit in enumerate(units) for param in unit}
        self._ready: list[Tensor] = []

    def complete(self, param: Tensor) -> None:
        """A post-accumulate-grad hook: adds a parameter to its unit, and steps the unit when all of its parameters are there."""
        unit = self._unit_of[id(param)]
        if any(each is param for each in self._ready):  # left over from a backward that an exception ended
            self._ready = []
        if self._ready and self._unit_of[id(self._ready[0])] != unit:  # a parameter of the unit before got no gradient
            self._step()
        self._ready.append(param)
        _, size = unit
        if len(self._ready) == size:
            self._step()
        elif len(self._ready) == 1:  # the last unit of a backward may stay incomplete
            Variable._execution_engine.queue_callback(self._step)

    def _step(self) -> None:
        params, self._ready = tuple(self._ready), []
        optimizer = self._optimizer()
        assert optimizer is not None, "kept as long as the model"
        _step_and_free(optimizer, params)


class _RefuseLaterWrapping:
    """A forward pre-hook that raises if the model was wrapped after preparation: hooks would see only this rank's gradients, or none.

    Copied with the model, it becomes an InertHook.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._unseen = params  # to be looked for in the model, once, at the first forward

    def __call__(self, model: nn.Module, _: object) -> None:
        for wrapper in used_wrappers():
            if wrapper.is_in_forward():
                raise ValueError(
                    f"the model was prepared for gradient release inside or before {wrapper.name}, so each rank would step by its own "
                    f"gradients; wrap it first, and pass the {wrapper.name} to prepare_for_gradient_release"
                )
        present = set(map(id, model.parameters()))
        if any(id(param) not in present for param in self._unseen):
            raise ValueError("parameters were replaced after prepare_for_gradient_release, as by fully_shard; call it after wrapping")
        self._unseen = ()

    def __reduce__(self) -> tuple[type[InertHook], tuple[()]]:
        return InertHook, ()


def _step_and_free(optimizer: Engine, params: Sequence[Tensor]) -> None:
    if not params:
        return
    try:
        optimizer.step(param=params)
    finally:  # also after an error: a gradient that is left would be added to the next one
        for param in params:
            if param.grad is not None and param.grad.is_cuda:
                local_of(param.grad).record_stream(torch.cuda.current_stream())  # its memory may belong to another stream
            param.grad = None


def _units_of(params: Iterable[Tensor], reduced_together: Iterable[Sequence[Tensor]]) -> list[Unit]:
    """Group parameters into units: those that a wrapper reduces together, and each other parameter alone."""
    number = {param: number for number, unit in enumerate(reduced_together) for param in unit}
    units: dict[int | Tensor, list[Tensor]] = {}
    for param in params:
        units.setdefault(number.get(param, param), []).append(param)
    return [tuple(unit) for unit in units.values()]
