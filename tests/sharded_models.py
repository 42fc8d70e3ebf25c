"""One awkward model under every wrapper, and the slice of any full tensor that a rank then holds.

Where a wrapper puts each element is found out from the wrapper itself, not from the code under test: a copy of the model whose elements are
their own flat indices is wrapped alike.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sharded_optim as so
from sharded_optim.sharding import FlatLayout

RADIX = 128  # of an index whose two digits every dtype holds


class AwkwardModel(nn.Module):
    """Scalars, empty tensors, prime sizes and fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.empty(()))
        self.empty = nn.Parameter(torch.empty(0))
        self.one = nn.Parameter(torch.empty(1))
        self.five = nn.Parameter(torch.empty(5))
        self.vector = nn.Parameter(torch.empty(4096))
        self.few_rows = nn.Parameter(torch.empty(1, 7))
        self.small = nn.Parameter(torch.empty(7, 3))
        self.cube = nn.Parameter(torch.empty(3, 5, 2))
        self.up = nn.Linear(17, 33)
        self.down = nn.Linear(33, 6)


@cache
def _mesh(*names: str) -> DeviceMesh:
    """All ranks: in a row, or, with two names, in two rows."""
    world_size = dist.get_world_size()
    return init_device_mesh("cpu", (world_size,) if len(names) == 1 else (2, world_size // 2), mesh_dim_names=names)


def _ddp(model: AwkwardModel) -> None:
    """DDP leaves the parameters as they are: every rank holds all of them."""


def _fsdp2(model: AwkwardModel) -> None:
    fully_shard(model, mesh=_mesh("shard"), ignored_params={model.scalar})


def _hsdp(model: AwkwardModel) -> None:
    mesh = _mesh("replicate", "shard")
    fully_shard(model, mesh=mesh, ignored_params={model.scalar})


def _fsdp2_tp(model: AwkwardModel) -> None:
    mesh = _mesh("dp", "tp")
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"], ignored_params={model.scalar})


def _fsdp1(model: AwkwardModel) -> FlatLayout:
    options = {"use_orig_params": True, "device_id": torch.device("cpu")}
    return so.fsdp1_layout(FullyShardedDataParallel(model, ignored_states=[model.scalar], **options))


WRAPPERS: dict[str, Callable[[AwkwardModel], FlatLayout | None]] = {
    "ddp": _ddp,
    "fsdp2": _fsdp2,
    "hsdp": _hsdp,
    "fsdp2_tp": _fsdp2_tp,
    "fsdp1": _fsdp1,
}


class ShardedModel:
    """`AwkwardModel` with the given full values, under a wrapper."""

    def __init__(self, wrapper: str, values: dict[str, Tensor]) -> None:
        self.params, self.layout = self._wrap(wrapper, values)
        self._indices = self._indices_under(wrapper, next(iter(values.values())).dtype)  # by which wrappers pad

    @classmethod
    @cache
    def _indices_under(cls, wrapper: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Which elements of each tensor this rank's part has: int64."""
        indices = {name: torch.arange(param.numel()).view(param.shape) for name, param in AwkwardModel().named_parameters()}
        high, _ = cls._wrap(wrapper, {name: (index // RADIX).to(dtype) for name, index in indices.items()})
        low, _ = cls._wrap(wrapper, {name: (index % RADIX).to(dtype) for name, index in indices.items()})
        return {name: cls.local(high[name]).long() * RADIX + cls.local(low[name]).long() for name in high}

    @staticmethod
    def _wrap(wrapper: str, values: dict[str, Tensor]) -> tuple[dict[str, nn.Parameter], FlatLayout | None]:
        model = AwkwardModel().to(next(iter(values.values())).dtype)
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(values[name])
        layout = WRAPPERS[wrapper](model)
        return dict(model.named_parameters()), layout

    @staticmethod
    def local(tensor: Tensor) -> Tensor:
        """This rank's part of a parameter, gradient or state."""
        return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()

    def slice_of(self, name: str, full: Tensor) -> Tensor:
        """This rank's part of a full tensor that is sharded like parameter `name`."""
        return full.flatten()[self._indices[name]]

    def set_grads(self, grads: dict[str, Tensor]) -> None:
        """Give each parameter this rank's part of its full gradient, and none to the others."""
        for name, param in self.params.items():
            if name not in grads:
                param.grad = None
                continue
            local = self.slice_of(name, grads[name])
            if isinstance(param, DTensor):
                param.grad = DTensor.from_local(
                    local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
                )
            else:
                param.grad = local
