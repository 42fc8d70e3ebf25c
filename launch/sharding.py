"""Shard the model over the ranks, and step the sharded model.

To add a wrapper, write a function for it, and add its name to `SHARDINGS` and `Config.sharding`. Every rank calls the function with the
same weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import sharded_optim as so
from launch.config import Config
from launch.model import GPT, Block
from launch.optimizer import build_optimizer

__all__ = ["SHARDINGS", "Sharded", "shard"]

FSDP1_PREFIX = "_fsdp_wrapped_module."  # before the names of parameters in each wrapped module


@dataclass(frozen=True, kw_only=True)
class Sharded:
    """A model that is spread over the ranks, with its optimizer.

    Attributes:
        model: the model to call, wrapped if the sharding wraps it.
        optimizer: an optimizer of this library, whose param groups the schedule changes.
        engine: the DeepSpeedEngine, which runs backward and steps; None under other wrappers.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    engine: Any = None

    def step(self, loss: Tensor) -> None:
        """Run backward from a loss, step, and clear the gradients."""
        if self.engine is not None:
            self.engine.backward(loss)
            self.engine.step()
            return
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


BuildOptimizer = Callable[..., torch.optim.Optimizer]  # takes named parameters, with the names of the unwrapped model
Wrapper = Callable[[GPT, BuildOptimizer, Config, torch.device], Sharded]


def shard(model: GPT, config: Config, device: torch.device) -> Sharded:
    """Shard a model over the ranks by the config's `sharding`."""
    build = partial(
        build_optimizer,
        config=config.optimizer,
        nonfinite="skip",  # so that ranks agree under every optimizer: none may skip a step, or fail, alone
        max_skipped_steps=config.max_skipped_steps,
        dimensions={name: param.ndim for name, param in model.named_parameters()},
        muon_groups=so.muon_param_groups(model, rest=config.muon_rest, split={"attention.qkv": config.model.d_model}),
    )
    return SHARDINGS[config.sharding](model, build, config, device)


def _fsdp2(model: GPT, build: BuildOptimizer, config: Config, device: torch.device) -> Sharded:
    """FSDP2: each rank keeps a slice of every parameter; the parameters of a block are gathered while the block runs."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("data",))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return Sharded(model=model, optimizer=build(model.named_parameters()))


def _fsdp1(model: GPT, build: BuildOptimizer, config: Config, device: torch.device) -> Sharded:
    """FSDP1: each rank keeps a range of every block, whose parameters are flattened together and gathered while the block runs."""
    wrapped = FullyShardedDataParallel(model, auto_wrap_policy=ModuleWrapPolicy({Block}), device_id=device, use_orig_params=True)
    named = [(name.replace(FSDP1_PREFIX, ""), param) for name, param in wrapped.named_parameters()]
    return Sharded(model=wrapped, optimizer=build(named, layout=so.fsdp1_layout(wrapped)))


def _zero(model: GPT, build: BuildOptimizer, config: Config, device: torch.device, stage: Literal[1, 2]) -> Sharded:
    """ZeRO: each rank keeps the whole model and a range of the state, in stage 2 also of gradients, which the optimizer averages."""
    optimizer = build(model.named_parameters(), constructor=so.ShardedOptimizer, stage=stage, module=model)
    return Sharded(model=model, optimizer=optimizer)


def _ddp(model: GPT, build: BuildOptimizer, config: Config, device: torch.device) -> Sharded:
    """DDP: each rank keeps the whole model."""
    wrapped = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    return Sharded(model=wrapped, optimizer=build(model.named_parameters()))


def _single(model: GPT, build: BuildOptimizer, config: Config, device: torch.device) -> Sharded:
    return Sharded(model=model, optimizer=build(model.named_parameters()))


def _deepspeed(model: GPT, build: BuildOptimizer, config: Config, device: torch.device) -> Sharded:
    """DeepSpeed: the stage decides whether a rank keeps a range of state, gradients or parameters. The engine runs backward and steps."""
    import deepspeed

    assert config.deepspeed is not None, "Config demands it"
    deepspeed.utils.logger.setLevel("ERROR")
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)  # DeepSpeed calls it
    optimizer = build(model.named_parameters())
    deepspeed_config = config.deepspeed | {"train_batch_size": config.batch_size}
    with redirect_stdout(StringIO()):  # each rank prints that it has loaded an extension
        engine, *_ = so.deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config)
    return Sharded(model=engine, optimizer=optimizer, engine=engine)


SHARDINGS: dict[str, Wrapper] = {
    "fsdp2": _fsdp2,
    "fsdp1": _fsdp1,
    "zero2": partial(_zero, stage=2),
    "zero1": partial(_zero, stage=1),
    "ddp": _ddp,
    "single": _single,
    "deepspeed": _deepspeed,
}
