"""`LiveModel`: this process's part of a model's parameters and persistent buffers, under their names without wrappers.

Supports all wrappers that are registered in `sharding/wrappers.py`; `deepspeed.py` makes the LiveModel of an engine.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sharded_optim.checkpoint.local_tensor import MODEL, LocalTensor
from sharded_optim.sharding import LocalParam, describe, used_wrappers
from sharded_optim.sharding.names import TRANSPARENT
from sharded_optim.sharding.segment import Segment
from sharded_optim.sharding.wrappers import NO_WRAPPER, FlatModel, wrapper_of
from sharded_optim.zero import finish_gathering

__all__ = ["LiveModel", "local_tensors", "named_tensors", "plain_tensor"]


@dataclass(frozen=True, kw_only=True)
class LiveModel:
    """The part of a model that this process holds.

    Attributes:
        tensors: this process's parts of the parameters and buffers.
        names: the names of parameters, except flattened ones.
        local_params: this process's part of each parameter that describes its own sharding, under its name in `names`.
        aliases: further names of tied tensors in `state_dict()` -> the name under which each tensor is saved.
        order: names of the parameters that a wrapper has flattened, on any rank, in the order of the model.
        wrapper_state: state that only the same wrapper can restore, by the wrapper's name.
        check_wrapper_state: called with saved state before anything is loaded; raises ValueError if its values are impossible.
        restore_wrapper_state: called with saved state after all tensors are loaded.
        masters: returns an optimizer's masters of the parameters, which are loaded with the model if the optimizer is not.
        before_load: called before tensors are loaded.
    """

    tensors: list[LocalTensor] = field(default_factory=list)
    names: Mapping[Tensor, str] = field(default_factory=dict)
    local_params: Mapping[Tensor, LocalParam] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    order: Sequence[str] = ()
    wrapper_state: dict[str, Any] = field(default_factory=dict)
    check_wrapper_state: Callable[[Any], None] = lambda _: None
    restore_wrapper_state: Callable[[Any], None] = lambda _: None
    masters: Callable[[], list[LocalTensor]] = list
    before_load: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, model: nn.Module) -> LiveModel:
        """Describe a module under any wrapper but DeepSpeed's.

        Raises:
            ValueError: its sharding cannot be determined.
        """
        finish_gathering(model)
        used = used_wrappers()
        for wrapper in used:
            wrapper.reshard(model)
        names, aliases, buffers = named_tensors(model)
        for wrapper in used:
            flat = wrapper.content(model, names)
            if flat is not None:
                return cls._of_flat(flat, aliases, buffers)
        local_params = {param: describe(param, name) for param, name in names.items() if param.is_floating_point()}
        tensors: list[LocalTensor] = []
        for param, name in names.items():
            own = local_params.get(param)
            tensors += [plain_tensor(param, name)] if own is None else local_tensors(MODEL, param, own)
        return cls(tensors=tensors + buffers, names=names, local_params=local_params, aliases=aliases)

    @classmethod
    def _of_flat(cls, flat: FlatModel, aliases: Mapping[str, str], buffers: list[LocalTensor]) -> LiveModel:
        layout = flat.layout
        tensors: list[LocalTensor] = []
        for param in layout.flat:
            tensors += local_tensors(MODEL, param, layout.describe(param, "a flat parameter"))
        tensors += [plain_tensor(param, name) for param, name in layout.whole.items()]
        return cls(tensors=tensors + buffers, names=layout.whole, aliases={**flat.aliases, **aliases}, order=flat.order)


def local_tensors(kind: str, tensor: Tensor, param: LocalParam) -> Iterator[LocalTensor]:
    """Describe this process's part of a parameter, or of a tensor sharded like it. Several local tensors if a wrapper has flattened it."""
    local = param.local(tensor, "values" if kind == MODEL else kind)
    for piece in param.pieces:
        yield LocalTensor(kind=kind, segment=piece.segment, local=piece.of(local))


def plain_tensor(tensor: Tensor, name: str, *, is_buffer: bool = False) -> LocalTensor:
    """Describe this process's part of a parameter or buffer of any dtype: all of it, unless a wrapper has sharded it."""
    if type(tensor) not in (Tensor, nn.Parameter) or wrapper_of(tensor) is not NO_WRAPPER:
        (local,) = local_tensors(MODEL, tensor, describe(tensor, name))
        return local
    return LocalTensor(kind=MODEL, segment=Segment.whole(name, tensor.shape), local=tensor, is_buffer=is_buffer)


def named_tensors(
    model: nn.Module, names: Mapping[Tensor, str] | None = None
) -> tuple[dict[Tensor, str], dict[str, str], list[LocalTensor]]:
    """Name a model's parameters and persistent buffers as `state_dict()` does without wrappers.

    Args:
        names: the names of the parameters, if the wrapper has its own names for them.

    Returns:
        The names of parameters; further names of tied tensors -> the first name, under which they are saved; the buffers.
    """
    first = dict(names or {})
    aliases: dict[str, str] = {}
    buffers: dict[Tensor, str] = {}
    for prefix, module in _modules(model, ""):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or name in module._non_persistent_buffers_set:
                continue
            if first.setdefault(tensor, prefix + name) != prefix + name:
                aliases[prefix + name] = first[tensor]
            elif name in module._buffers:
                buffers[tensor] = prefix + name
    params = {tensor: name for tensor, name in first.items() if tensor not in buffers}
    return params, aliases, [plain_tensor(buffer, name, is_buffer=True) for buffer, name in buffers.items()]


def _modules(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Walk the modules of a model with the prefix of the names in each; a shared module occurs several times. Warns of extra state."""
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        warnings.warn(
            f"{prefix.removesuffix('.') or 'the model'} ({type(module).__name__}) has extra state (get_extra_state), which checkpoints "
            f"do not hold; save what it needs in extra=",
            UserWarning,
            stacklevel=2,
        )
    yield prefix, module
    transparent = TRANSPARENT | {wrapper.inner(module) for wrapper in used_wrappers()}
    for name, child in module._modules.items():
        if child is not None:
            yield from _modules(child, prefix if name in transparent else f"{prefix}{name}.")
