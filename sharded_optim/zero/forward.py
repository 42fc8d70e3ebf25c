"""Which parameters a forward pass needs when: the all-gather of a step is waited for bucket by bucket, as modules run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

__all__ = ["wait_in_forward"]

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def wait_in_forward(model: nn.Module, wait: Callable[[list[Tensor]], None], wait_for_all: Callable[[], None]) -> list[Callable[[], None]]:
    """Have parameters waited for before the modules run that use them, and all before the model's state dict is taken.

    A module that contains no ModuleList, ModuleDict or Sequential waits for all parameters below it, as it may use them without calling
    the modules that hold them: nn.MultiheadAttention does so. Other modules wait for those that they hold themselves.

    Args:
        model: the whole model, not wrapped.
        wait: waits for the parameters that it is given.
        wait_for_all: waits for all.

    Returns:
        What takes the hooks away again.
    """
    handles = [model.register_state_dict_pre_hook(lambda *_: wait_for_all())]
    for module, params in _needs(model):
        handles.append(module.register_forward_pre_hook(_Wait(params, wait)))
    return [handle.remove for handle in handles]


class _Wait:
    """A forward pre-hook."""

    def __init__(self, params: list[Tensor], wait: Callable[[list[Tensor]], None]) -> None:
        self._params = params
        self._wait = wait

    def __call__(self, *_: object) -> None:
        self._wait(self._params)


def _needs(module: nn.Module) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    """Each module that waits, and for what."""
    is_unit = not any(isinstance(each, CONTAINERS) for each in module.modules())
    params: list[Tensor] = [*module.parameters(recurse=is_unit)]
    if params:
        yield module, params
    if not is_unit:
        for child in module.children():
            yield from _needs(child)
