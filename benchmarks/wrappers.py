"""Who is compared in `distributed.py`: each contender wraps a model and makes its optimizer. A new one is one new entry of `CONTENDERS`.

All get the same hyperparameters, and a process group of their own where the library takes one. A library that cannot be had raises when the
model is wrapped, on every rank, and its reason goes into the report.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from benchmarks.contenders import HYPERPARAMETERS, OURS, find

__all__ = ["BASELINE", "CONTENDERS", "DEEPSPEED", "Contender", "Training", "by_name"]

BASELINE = "DDP + torch fused"
DEEPSPEED = "deepspeed"
PARAMETERS, GRADIENTS, STATE = "parameters", "gradients", "state"
FLOATS = {PARAMETERS: 1, GRADIENTS: 1, STATE: 2}  # that training with AdamW has for each element


# The fastest of what was tried with deepspeed 0.19.8 on 23M parameters: a whole step takes 425 ms with these, 450 to 530 ms with others.
# The optimizer's part takes 140 ms with these, with the defaults, `overlap_comm` and its own Adams. Buckets are as large as DDP's.
DEEPSPEED_OPTIONS: dict[str, Any] = {"contiguous_gradients": False, "reduce_bucket_size": 25 * 2**18}


def nothing() -> None:
    """What a contender does that need not do anything."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A wrapped model, and the parts of its training step."""

    forward: Callable[[Tensor], Tensor]
    step: Callable[[], object]
    zero_grad: Callable[[], object]
    backward: Callable[[Tensor], object] = Tensor.backward
    finish_reduction: Callable[[], object] = nothing  # returns when the gradients of the last backward pass are reduced
    wait: Callable[[], object] = nothing  # returns when all parameters are there
    close: Callable[[], object] = nothing


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to train a model on several ranks."""

    name: str
    wrap: Callable[[nn.Module, dist.ProcessGroup], Training]  # the model is the same on every rank, and the contender's own
    library: str = "torch"
    algorithm: str = "AdamW"
    sharded: tuple[str, ...] = ()  # of which a rank keeps its share only, keys of `FLOATS`

    def bytes_in_theory(self, elements: int, world_size: int) -> float:
        """Of float32 parameters, gradients and moments on a rank, without any buffer."""
        return sum(4 * elements * floats / (world_size if kind in self.sharded else 1) for kind, floats in FLOATS.items())


def _sharded(stage: int) -> tuple[str, ...]:
    """By a stage of ZeRO."""
    return (STATE, GRADIENTS, PARAMETERS)[:stage]


def _ddp(model: nn.Module, process_group: dist.ProcessGroup, **options: Any) -> Training:
    wrapped = DistributedDataParallel(model, process_group=process_group, **options)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **HYPERPARAMETERS)
    return Training(forward=wrapped, step=optimizer.step, zero_grad=optimizer.zero_grad)


def _zero_redundancy(model: nn.Module, process_group: dist.ProcessGroup, *, bucket_view: bool) -> Training:
    wrapped = DistributedDataParallel(model, process_group=process_group)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(),
        optimizer_class=torch.optim.AdamW,
        process_group=process_group,
        parameters_as_bucket_view=bucket_view,
        fused=True,
        **HYPERPARAMETERS,
    )
    return Training(forward=wrapped, step=optimizer.step, zero_grad=optimizer.zero_grad)


def _deepspeed(model: nn.Module, _: dist.ProcessGroup, *, stage: int) -> Training:
    """DeepSpeed trains on the default process group. Its step sets gradients to None itself.

    Imported by name: it is not among the development packages, and its import prints.
    """
    deepspeed = import_module(DEEPSPEED)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # the default clips
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage} | DEEPSPEED_OPTIONS,
    }
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **HYPERPARAMETERS)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    return Training(forward=engine, backward=engine.backward, step=engine.step, zero_grad=nothing, close=engine.destroy)


def _of_deepspeed(stage: int) -> Contender:
    return Contender(
        name=f"DeepSpeed ZeRO-{stage} + torch fused",
        wrap=partial(_deepspeed, stage=stage),
        library=DEEPSPEED,
        sharded=_sharded(stage),
    )


def _fsdp2(model: nn.Module, process_group: dist.ProcessGroup) -> Training:
    mesh = DeviceMesh.from_group(process_group, "cpu")
    layers = model.get_submodule("layers")
    for layer in layers.children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **HYPERPARAMETERS)
    return Training(forward=model, step=optimizer.step, zero_grad=optimizer.zero_grad)


def _ours(model: nn.Module, process_group: dist.ProcessGroup, *, algorithm: str, **options: Any) -> Training:
    library = import_module(OURS)
    optimizer = library.ShardedOptimizer(model, getattr(library, algorithm), process_group=process_group, **options, **HYPERPARAMETERS)
    return Training(
        forward=model,
        step=optimizer.step,
        zero_grad=optimizer.zero_grad,
        finish_reduction=getattr(optimizer, "finish_reduction", nothing),
        wait=getattr(optimizer, "wait", nothing),
    )


def _of_ours(stage: int, algorithm: str, *, sends: bool = False) -> Contender:
    return Contender(
        name=f"ours ZeRO-{stage} {algorithm}{', by sends' if sends else ''}",
        wrap=partial(_ours, algorithm=algorithm, stage=stage, transport="sends" if sends else "auto"),
        library=OURS,
        algorithm=algorithm,
        sharded=_sharded(stage),
    )


CONTENDERS = (
    Contender(name=BASELINE, wrap=_ddp),
    Contender(name="DDP + torch fused, bucket views", wrap=partial(_ddp, gradient_as_bucket_view=True)),
    Contender(name="DDP + ZeroRedundancyOptimizer", wrap=partial(_zero_redundancy, bucket_view=False), sharded=_sharded(1)),
    Contender(name="DDP + ZeroRedundancyOptimizer, bucket views", wrap=partial(_zero_redundancy, bucket_view=True), sharded=_sharded(1)),
    _of_deepspeed(1),
    _of_deepspeed(2),
    Contender(name="FSDP2 + torch fused", wrap=_fsdp2, sharded=_sharded(3)),
    _of_ours(1, "AdamW"),
    _of_ours(2, "AdamW"),
    _of_ours(2, "AdamW", sends=True),
    _of_ours(2, "StableAdamW"),
)


def by_name(name: str) -> Contender:
    """As `contenders.find`, of those that train on several ranks."""
    return find(name, CONTENDERS)
