"""Wait for a step's all-gathers in the next forward pass: each module waits for the buckets of its own parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar
from weakref import WeakSet

from torch import Tensor, nn

from sharded_optim.sharding.hooks import InertHook
from sharded_optim.zero.bucket import ParamSlot
from sharded_optim.zero.gathering import Gatherer

__all__ = ["ForwardHooks", "finish_gathering"]

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
NOT_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class ForwardHooks:
    """Hooks that wait for a module's parameters before its forward pass, and for all parameters before a state dict is saved or loaded.

    A module that contains no ModuleList, ModuleDict or Sequential waits for all parameters below it, as it may use them without calling
    the modules that hold them: nn.MultiheadAttention does so. Other modules wait for the parameters that they hold themselves or in lists.

    The hooks hold no reference to the optimizer: its running transfers end also after it is freed.

    Args:
        model: the whole model, not wrapped.
        gatherer: the optimizer's gatherer, which has the running transfers.
        slots: the slots of the optimizer's parameters; may grow.
    """

    released: ClassVar[WeakSet[ForwardHooks]] = WeakSet()  # released, but not yet removed: transfers are running

    def __init__(self, model: nn.Module, gatherer: Gatherer, slots: Mapping[Tensor, ParamSlot]) -> None:
        self._gatherer = gatherer
        self._slots = slots
        params = list(model.parameters())
        self._handles = [
            model.register_state_dict_pre_hook(_Wait(self, params)),
            model.register_load_state_dict_pre_hook(_Wait(self, params, settles=True)),
        ]
        self._handles += [module.register_forward_pre_hook(_WaitInForward(self, params)) for module, params in _needs(model)]
        self._is_released = False

    def wait(self, params: Sequence[Tensor], *, settles: bool) -> None:
        if self._gatherer.is_pending:
            buckets = {slot.bucket: None for param in params if (slot := self._slots.get(param)) is not None}  # in order
            self._gatherer.wait(buckets, settles=settles)

    def release(self) -> None:
        """Remove the hooks, as the optimizer is freed or superseded: now, or once its transfers have ended.

        Does not wait for ranks that are behind this one.
        """
        self._is_released = True
        if all(slot.bucket.gathering.has_ended() for slot in self._slots.values()):
            ForwardHooks.released.discard(self)
            while self._handles:
                self._handles.pop().remove()
            self._slots = {}
        else:
            ForwardHooks.released.add(self)

    def try_again(self) -> None:
        """Remove hooks that were released earlier, if the transfers have ended by now."""
        if self._is_released:
            self.release()

    def finish(self) -> None:
        """Wait for all transfers."""
        self.wait(list(self._slots), settles=False)
        self.try_again()


def finish_gathering(model: nn.Module) -> None:
    """Wait for running transfers of a model's parameters, also those of an optimizer that has been freed."""
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, _Wait):
                hook()


class _Wait:
    """A state-dict pre-hook that waits for parameters. Copied with the model, it becomes an InertHook."""

    def __init__(self, hooks: ForwardHooks, params: Sequence[Tensor], *, settles: bool = False) -> None:
        self._hooks = hooks
        self._params = params
        self._settles = settles

    def __call__(self, *_: object) -> None:
        self._hooks.wait(self._params, settles=self._settles)

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return InertHook, ()


class _WaitInForward(_Wait):
    """A forward pre-hook that waits. It may remove itself: modules iterate over a copy of these hooks, but not of state-dict hooks."""

    def __call__(self, *_: object) -> None:
        super().__call__()
        self._hooks.try_again()


def _needs(module: nn.Module) -> Iterator[tuple[nn.Module, Sequence[Tensor]]]:
    """Yield each module that has to wait in its forward pass, with the parameters that it waits for."""
    has_containers = any(isinstance(submodule, CONTAINERS) for submodule in module.modules())
    params: Sequence[Tensor] = list(_own(module)) if has_containers else [*module.parameters()]
    if params:
        yield module, params
    for child in module.children():
        yield from _needs(child)


def _own(module: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters that a module holds itself, or in lists and dicts, which are never called and so never wait."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if isinstance(child, NOT_CALLED):
            yield from _own(child)
