"""FSDP2 (`fully_shard`): the changes that it makes to a model. Its parameters are DTensors, described in `dtensor.py`."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sharded_optim.sharding.wrappers import Wrapper

__all__ = ["WRAPPER"]


def _units(model: nn.Module) -> Iterable[list[Tensor]]:
    """Return the parameters of each `fully_shard` call. FSDP2 reduces their gradients together, and then runs the hook of each."""
    units: list[list[Tensor]] = []
    known: set[Tensor] = set()

    def collect(module: nn.Module, unit: list[Tensor] | None) -> None:
        if isinstance(module, FSDPModule):
            unit = []
            units.append(unit)
        for param in module.parameters(recurse=False):
            if unit is not None and param not in known and isinstance(param, DTensor):  # an ignored parameter stays an ordinary tensor
                known.add(param)
                unit.append(param)
        for child in module.children():
            collect(child, unit)

    collect(model, None)
    return units


def _reshard(model: nn.Module) -> None:
    """Put the sharded parameters back into the modules, where a forward pass without a backward pass has left gathered copies."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            FSDPModule.reshard(module)


WRAPPER = Wrapper(name="fully_shard", units=_units, reshard=_reshard)
