"""What a model holds: parameters and persistent buffers, under the names that they have without wrappers."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sharded_optim.checkpoint.held import MODEL, Held
from sharded_optim.segment import Segment
from sharded_optim.sharding import FlatLayout, describe

__all__ = ["LiveModel", "buffers_of", "flattened_names", "held_of", "names_of"]

TRANSPARENT = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}  # wrappers' names for what they wrap


@dataclass(frozen=True, kw_only=True)
class LiveModel:
    """What this process holds of a model.

    Attributes:
        held: of its tensors.
        wrapper: what only the same wrapper takes up again, by the wrapper's name.
        resume: takes that up, when all tensors are loaded.
        prepare: called before they are.
    """

    held: list[Held]
    wrapper: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[], None] = lambda: None
    resume: Callable[[Any], None] = lambda _: None

    @classmethod
    def of(cls, model: nn.Module) -> LiveModel:
        """Of a module, wrapped or not, but by DeepSpeed.

        Raises:
            ValueError: it does not tell what it holds.
        """
        layout = _fsdp1_layout(model)
        held = []
        if layout is not None:
            for param, flat in layout.flat.items():
                local = layout.describe(param, "a flat parameter")
                held += [Held(kind=MODEL, segment=piece.segment, local=piece.of(local.local(param, "values"))) for piece in flat.pieces]
            held += [held_of(param, name) for param, name in layout.whole.items()]
        else:
            held += [held_of(param, name) for param, name in names_of(model).items()]
        return cls(held=held + [held_of(buffer, name) for name, buffer in buffers_of(model).items()])


def held_of(tensor: Tensor, name: str, kind: str = MODEL) -> Held:
    """What this process holds of a tensor that tells how it is sharded."""
    if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_floating_point():  # which nothing that describes shards expects
        return Held(kind=kind, segment=Segment.whole(name, tensor.shape), local=tensor)
    if hasattr(tensor, "ds_id"):
        raise ValueError(f"{name!r} is partitioned by DeepSpeed; pass the engine as model=, not its module")
    found = describe(tensor, name)
    (piece,) = found.pieces
    return Held(kind=kind, segment=piece.segment, local=piece.of(found.local(tensor, "values")))


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


def flattened_names(model: nn.Module) -> list[str]:
    """The names of the parameters that FullyShardedDataParallel has flattened, on whatever rank they are, in the order of the model."""
    if _fsdp1_layout(model) is None:
        return []
    from sharded_optim.sharding import fsdp1

    return [name for tensors in fsdp1.flattened(model).values() for name, _ in tensors]


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each module of a model once, with what precedes the names in it."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        if module in seen:
            return
        seen.add(module)
        yield prefix, module
        for name, child in module._modules.items():
            if child is not None:
                is_inside = name in TRANSPARENT or (name == "module" and isinstance(module, DistributedDataParallel))
                yield from walk(child, prefix if is_inside else f"{prefix}{name}.")

    yield from walk(model, "")


def _fsdp1_layout(model: nn.Module) -> FlatLayout | None:
    """Of what FullyShardedDataParallel has flattened in a model; None where that is nothing."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever has wrapped a model has imported it
    if fsdp is None or not any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        return None
    from sharded_optim.sharding import fsdp1

    return fsdp1.layout_of(model) if fsdp1.flattened(model) else None
