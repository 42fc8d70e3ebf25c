"""Wait for the all-gather of a step bucket by bucket, as the modules of the forward pass need the parameters."""

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
    """Hooks that wait for parameters before a module uses them, and for all before state dicts are saved or loaded.

    A module that contains no ModuleList, ModuleDict or Sequential waits for all parameters below it, as it may use them without calling
    the modules that hold them: nn.MultiheadAttention does so. Other modules wait for those that they hold themselves or in lists.

    The hooks hold what they need, not the optimizer: what it has begun ends also when it is gone.

    Args:
        model: the whole model, not wrapped.
        gatherer: of the optimizer.
        slots: of its parameters, also of those that come later.
    """

    released: ClassVar[WeakSet[ForwardHooks]] = WeakSet()  # that are still there, as transfers go on

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
        """Remove the hooks when the optimizer is gone or superseded: now, or when its transfers have ended.

        Waits for no rank that has not got as far as this one.
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
        """Remove the hooks if that is still to be done."""
        if self._is_released:
            self.release()

    def finish(self) -> None:
        """Wait for all transfers."""
        self.wait(list(self._slots), settles=False)
        self.try_again()


def finish_gathering(model: nn.Module) -> None:
    """Wait for transfers of a model's parameters, also of an optimizer that is gone."""
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, _Wait):
                hook()


class _Wait:
    """A state-dict pre-hook. A copy of it, in a copy of the model, has nothing to wait for."""

    def __init__(self, hooks: ForwardHooks, params: Sequence[Tensor], *, settles: bool = False) -> None:
        self._hooks = hooks
        self._params = params
        self._settles = settles

    def __call__(self, *_: object) -> None:
        self._hooks.wait(self._params, settles=self._settles)

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return InertHook, ()


class _WaitInForward(_Wait):
    """A forward pre-hook. It may remove itself: modules call their hooks from a copy of the list, but state-dict hooks from the list."""

    def __call__(self, *_: object) -> None:
        super().__call__()
        self._hooks.try_again()


def _needs(module: nn.Module) -> Iterator[tuple[nn.Module, Sequence[Tensor]]]:
    """Return each module with the parameters that it waits for."""
    is_unit = not any(isinstance(each, CONTAINERS) for each in module.modules())
    params: Sequence[Tensor] = [*module.parameters()] if is_unit else list(_own(module))
    if params:
        yield module, params
    for child in module.children():
        yield from _needs(child)


def _own(module: nn.Module) -> Iterator[Tensor]:
    """Return the parameters of a module itself, and of submodules that are never called."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if isinstance(child, NOT_CALLED):
            yield from _own(child)
