"""DistributedDataParallel: its modules in this process, and a guard against torch's Join, which lets ranks end early.

DistributedDataParallel leaves no mark on parameters, and Join marks only its modules. So DistributedDataParallel modules are searched among
all Python objects, once for each set of parameters. Used by the engine and by ShardedOptimizer. Relies on private names of torch,
`_join_config` and `Join._joinables`, tried with torch 2.11 and 2.13.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any
from weakref import ref

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sharded_optim.sharding import ddp_buckets
from sharded_optim.sharding.wrappers import Wrapper

__all__ = ["JOIN_REFUSED", "WRAPPER", "JoinGuard", "averaged_params", "ddp_modules", "objects_of"]

JOIN_REFUSED = (
    "torch.distributed.algorithms.join.Join lets ranks run out of inputs, but a step of this optimizer is a collective, which would wait "
    "for them; give all ranks as many batches (DistributedSampler(drop_last=True)), or use an optimizer whose step needs no other rank, "
    "as so.AdamW with nonfinite='allow' outside of ShardedOptimizer"
)


class JoinGuard:
    """Refuses steps inside of a Join context, for an optimizer whose step is a collective.

    A rank that has run out of inputs would not take part in the step, and Join replaces only the collectives of DistributedDataParallel.
    """

    def __init__(self) -> None:
        self._key = 0
        self._modules: list[ref[DistributedDataParallel]] | None = None
        # Configurations of contexts that have been left, which torch does not remove from the module. By id, as they are equal tuples.
        self._left: dict[int, Any] = {}

    def check(self, params: Iterable[Tensor], key: int) -> None:
        """Raise ValueError inside of a Join context, on every rank that steps there.

        Args:
            params: the parameters that are stepped.
            key: modules are searched again when the key changes.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        if self._modules is None or key != self._key or any(known() is None for known in self._modules):  # a model may be wrapped again
            self._key = key
            self._modules = [ref(module) for module in ddp_modules()]
        for known in self._modules:
            module = known()
            if module is None:
                continue
            config = module._join_config
            if not config.enable or config.throw_on_early_termination or id(config) in self._left:
                continue  # a Join with throw_on_early_termination raises in the forward pass, on all ranks
            if not _is_in_context(module):
                self._left[id(config)] = config
            elif not averaged_params([module]).keys().isdisjoint(map(id, params)):
                raise ValueError(JOIN_REFUSED)


def ddp_modules() -> list[DistributedDataParallel]:
    """Return all DistributedDataParallel modules of this process."""
    return objects_of(DistributedDataParallel)


def averaged_params(modules: Iterable[DistributedDataParallel]) -> dict[int, str]:
    """Return the names of the parameters whose gradients DistributedDataParallel averages, by id of the parameter."""
    return {id(param): name for ddp in modules for name, param in ddp.module.named_parameters() if name not in ddp.parameters_to_ignore}


def objects_of(kind: type) -> list[Any]:
    """Return all objects in this process that are instances of a type. Takes tens of milliseconds."""
    objects = gc.get_objects()
    kinds = {found for found in set(map(type, objects)) if kind in found.__mro__}  # half a million objects have few types
    return [candidate for candidate in objects if type(candidate) in kinds] if kinds else []


def _is_in_context(module: DistributedDataParallel) -> bool:
    """Return whether an enabled Join context of this module exists now."""
    from torch.distributed.algorithms.join import Join  # imported here, as its module needs torch.distributed

    return any(join._enable and any(joinable is module for joinable in join._joinables) for join in objects_of(Join))


def _inner(module: nn.Module) -> str | None:
    return "module" if isinstance(module, DistributedDataParallel) else None


WRAPPER = Wrapper(
    name="DistributedDataParallel",
    inner=_inner,
    release=ddp_buckets.release,
    is_in_forward=lambda: DistributedDataParallel._active_ddp_module is not None,  # tried with torch 2.11 and 2.13
)
