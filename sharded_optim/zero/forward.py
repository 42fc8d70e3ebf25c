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

    The hooks hold no reference to the optimizer: its running transfers end also after it is freed.

    Args:
        model: the whole model, not wrapped.
        gatherer: of the optimizer.
        slots: of its parameters; may grow.
    """

    released: ClassVar[WeakSet[ForwardHooks]] = WeakSet()  # released hooks that still wait for running transfers

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
        """Remove the hooks of an optimizer that is freed or superseded: now, or when its transfers have ended.

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
        """Remove the hooks if they are released and the transfers have ended."""
        if self._is_released:
            self.release()

    def finish(self) -> None:
        """Wait for all transfers."""
        self.wait(list(self._slots), settles=False)
        self.try_again()


def finish_gathering(model: nn.Module) -> None:
    """Wait for transfers of a model's parameters, also of an optimizer that has been freed."""
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, _Wait):
                hook()


class _Wait:
    """A state-dict pre-hook. A copy of it, in a copy of the model, does nothing."""

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
    has_containers = any(isinstance(submodule, CONTAINERS) for submodule in module.modules())
    params: Sequence[Tensor] = list(_own(module)) if has_containers else [*module.parameters()]
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
