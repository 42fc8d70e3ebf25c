"""How the model is spread over the ranks. To add a wrapper, write its function, and its name here and in `Config.sharding`.

Every rank comes with the same weights. A wrapper keeps `model` itself as it is named: the optimizer takes `model.named_parameters()`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from launch.model import GPT

__all__ = ["SHARDINGS"]


def _fsdp2(model: GPT, device: torch.device, world_size: int) -> nn.Module:
    """Each rank keeps a slice of every parameter; a block's are gathered while it runs."""
    mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("data",))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _ddp(model: GPT, device: torch.device, world_size: int) -> nn.Module:
    """Each rank keeps the whole model."""
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def _single(model: GPT, device: torch.device, world_size: int) -> nn.Module:
    return model


SHARDINGS: dict[str, Callable[[GPT, torch.device, int], nn.Module]] = {"fsdp2": _fsdp2, "ddp": _ddp, "single": _single}
