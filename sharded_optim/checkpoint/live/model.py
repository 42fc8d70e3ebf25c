"""What a model holds: parameters and persistent buffers, under the names that they have without wrappers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sharded_optim.checkpoint.held import MODEL, Held
from sharded_optim.sharding import LocalParam, describe, used_wrappers
from sharded_optim.sharding.names import TRANSPARENT
from sharded_optim.sharding.segment import Segment
from sharded_optim.sharding.wrappers import NO_WRAPPER, FlatModel, wrapper_of
from sharded_optim.zero import finish_gathering

__all__ = ["LiveModel", "aliases_of", "buffers_of", "held_of", "names_of"]


@dataclass(frozen=True, kw_only=True)
class LiveModel:
    """What this process holds of a model.

    Attributes:
        held: of its tensors.
        names: of its parameters, but of flat ones.
        local_params: what this process holds of those that tell how they are sharded, under these names.
        aliases: further names under which `state_dict()` has tensors, each with the one under which they are saved.
        order: the names of parameters that a wrapper has flattened, on whatever rank they are, in the order of the model.
        wrapper: what only the same wrapper takes up again, by the wrapper's name.
        check: raises ValueError for what of that cannot be, before anything is loaded.
        resume: takes that up, when all tensors are loaded.
        masters: values of the parameters that an optimizer keeps apart, which are to be loaded too where the optimizer is not.
        prepare: called before they are.
    """

    held: list[Held] = field(default_factory=list)
    names: Mapping[Tensor, str] = field(default_factory=dict)
    local_params: Mapping[Tensor, LocalParam] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    order: Sequence[str] = ()
    wrapper: dict[str, Any] = field(default_factory=dict)
    masters: Callable[[], list[Held]] = list
    prepare: Callable[[], None] = lambda: None
    check: Callable[[Any], None] = lambda _: None
    resume: Callable[[Any], None] = lambda _: None

    @classmethod
    def of(cls, model: nn.Module) -> LiveModel:
        """Of a module, wrapped or not, but by DeepSpeed.

        Raises:
            ValueError: it does not tell what it holds.
        """
        finish_gathering(model)
        used = used_wrappers()
        for wrapper in used:
            wrapper.reshard(model)
        named_buffers = buffers_of(model)
        buffers = [_held_of_plain(buffer, name, is_buffer=True) for name, buffer in named_buffers.items()]
        names = names_of(model)
        aliases = aliases_of(model, names, named_buffers)
        for wrapper in used:
            flat = wrapper.content(model, names)
            if flat is not None:
                return cls._of_flat(flat, buffers, aliases)
        local_params = {param: describe(param, name) for param, name in names.items() if param.is_floating_point()}
        held = [
            _held(MODEL, param, local_params[param]) if param in local_params else _held_of_plain(param, name)
            for param, name in names.items()
        ]
        return cls(held=held + buffers, names=names, local_params=local_params, aliases=aliases)

    @classmethod
    def _of_flat(cls, flat: FlatModel, buffers: list[Held], aliases: Mapping[str, str]) -> LiveModel:
        layout = flat.layout
        held: list[Held] = []
        for param, tensor in layout.flat.items():
            local = layout.describe(param, "a flat parameter").local(param, "values")
            held += [Held(kind=MODEL, segment=piece.segment, local=piece.of(local)) for piece in tensor.pieces]
        held += [_held_of_plain(param, name) for param, name in layout.whole.items()]
        return cls(held=held + buffers, names=layout.whole, aliases={**flat.aliases, **aliases}, order=flat.order)


def held_of(tensor: Tensor, name: str, *, is_buffer: bool = False) -> Held:
    """What this process holds of a parameter or buffer that tells how it is sharded."""
    if is_buffer or not tensor.is_floating_point():
        return _held_of_plain(tensor, name, is_buffer=is_buffer)
    return _held(MODEL, tensor, describe(tensor, name))


def _held(kind: str, param: Tensor, local: LocalParam) -> Held:
    (piece,) = local.pieces
    return Held(kind=kind, segment=piece.segment, local=piece.of(local.local(param, "values")))


def _held_of_plain(tensor: Tensor, name: str, *, is_buffer: bool = False) -> Held:
    """Of an ordinary tensor of any dtype: all of it."""
    if type(tensor) not in (Tensor, nn.Parameter) or wrapper_of(tensor) is not NO_WRAPPER:
        return _held(MODEL, tensor, describe(tensor, name))
    return Held(kind=MODEL, segment=Segment.whole(name, tensor.shape), local=tensor, is_buffer=is_buffer)


def names_of(model: nn.Module) -> dict[Tensor, str]:
    """A model's parameters with their names, tied ones under the first."""
    found: dict[Tensor, str] = {}
    for prefix, module in _modules(model):
        for name, param in module._parameters.items():
            if param is not None:
                found.setdefault(param, prefix + name)
    return found


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's persistent buffers, shared ones under the first name."""
    found: dict[Tensor, str] = {}
    for prefix, module in _modules(model):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            warnings.warn(
                f"{prefix.removesuffix('.') or 'the model'} ({type(module).__name__}) has extra state (get_extra_state), which checkpoints "
                f"do not hold; save what it needs in extra=",
                UserWarning,
                stacklevel=2,
            )
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found.setdefault(buffer, prefix + name)
    return {name: buffer for buffer, name in found.items()}


def aliases_of(model: nn.Module, names: Mapping[Tensor, str], buffers: Mapping[str, Tensor]) -> dict[str, str]:
    """Further names under which `state_dict()` has a model's tensors, each with the one under which they are saved.

    Args:
        names: of its parameters, as of `names_of`.
        buffers: as of `buffers_of`.
    """
    first = {**names, **{buffer: name for name, buffer in buffers.items()}}
    found: dict[str, str] = {}
    for prefix, module in _modules(model, again=True):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set and first.get(tensor, prefix + name) != prefix + name:
                found[prefix + name] = first[tensor]
    return found


def _modules(model: nn.Module, *, again: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Each module of a model, with what precedes the names in it: once, or with `again` as often as it is there."""
    seen: set[nn.Module] = set()
    used = used_wrappers()

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        if module in seen and not again:
            return
        seen.add(module)
        yield prefix, module
        inside = TRANSPARENT | {wrapper.inner(module) for wrapper in used}
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(child, prefix if name in inside else f"{prefix}{name}.")

    yield from walk(model, "")
