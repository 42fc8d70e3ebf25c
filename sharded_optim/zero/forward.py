"""Which parameters a forward pass needs when: the all-gather of a step is waited for bucket by bucket, as modules run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sharded_optim.zero.bucket import Home
from sharded_optim.zero.gathering import Gatherer

__all__ = ["finish_gathering", "wait_in_forward"]

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
NOT_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def wait_in_forward(model: nn.Module, gatherer: Gatherer, homes: Mapping[Tensor, Home]) -> None:
    """Have parameters waited for before the modules run that use them, and all before state dicts are taken or loaded.

    A module that contains no ModuleList, ModuleDict or Sequential waits for all parameters below it, as it may use them without calling
    the modules that hold them: nn.MultiheadAttention does so. Other modules wait for those that they hold themselves or in lists.

    The hooks hold what they need, not the optimizer: what it has begun ends also when it is gone.

    Args:
        model: the whole model, not wrapped.
        gatherer: of the optimizer.
        homes: of its parameters, also of those that come later.
    """
    everything = _Wait(list(model.parameters()), gatherer, homes)
    model.register_state_dict_pre_hook(everything)
    model.register_load_state_dict_pre_hook(_Wait(list(model.parameters()), gatherer, homes, settles=True))
    for module, params in _needs(model):
        module.register_forward_pre_hook(_Wait(params, gatherer, homes))


def finish_gathering(model: nn.Module) -> None:
    """Wait for what an optimizer that may be gone has begun with a model's parameters."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _Wait):
                hook()


class _Wait:
    """A forward or state-dict pre-hook. A copy of it, in a copy of the model, has nothing to wait for."""

    def __init__(self, params: list[Tensor], gatherer: Gatherer, homes: Mapping[Tensor, Home], *, settles: bool = False) -> None:
        self._params = params
        self._gatherer = gatherer
        self._homes = homes
        self._settles = settles

    def __call__(self, *_: object) -> None:
        if self._gatherer.is_pending:
            buckets = {home.bucket: None for param in self._params if (home := self._homes.get(param)) is not None}  # in order
            self._gatherer.wait(buckets, settles=self._settles)

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _Nothing, ()


class _Nothing:
    """The hook of a copied model."""

    def __call__(self, *_: object) -> None:
        pass


def _needs(module: nn.Module) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    """Each module, and what it waits for."""
    is_unit = not any(isinstance(each, CONTAINERS) for each in module.modules())
    params: list[Tensor] = [*module.parameters()] if is_unit else list(_own(module))
    if params:
        yield module, params
    for child in module.children():
        yield from _needs(child)


def _own(module: nn.Module) -> Iterator[Tensor]:
    """The parameters that a module holds itself, or in what nobody calls."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if isinstance(child, NOT_CALLED):
            yield from _own(child)
