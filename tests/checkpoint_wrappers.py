"""One model with given gradients under every wrapper, as a user would save, load and train it, and its parameters as whole tensors.

Under each of them, and on every number of ranks, training gives the bits of `unsharded`. Whole tensors are put together by the wrappers'
own means, not by the code under test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed_models
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import sharded_optim as so
from benchmarks.given_gradients import Groups, Model, Shapes, gradients, one_group, two_groups

__all__ = ["SHAPES", "WRAPPERS", "Trained", "make_optimizer", "worlds_of"]

SHAPES: Shapes = (((7, 3), (7,)), ((1,),), ((5,),), ((33, 17), (33,)), ((3, 5, 2),), ((64, 41), (64,)))
GROUPS: Mapping[int, Callable[[nn.Module], Groups]] = {1: one_group, 2: two_groups}

make_optimizer = partial(so.StableAdamW, lr=1e-2, weight_decay=0.1)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A wrapped model.

    Attributes:
        model, optimizer: what a user gives to `so.checkpoint`.
        step: trains one step, numbered from 1.
        whole: copies of the float32 values of all parameters. A collective.
    """

    model: Any
    optimizer: Any
    step: Callable[[int], None]
    whole: Callable[[], dict[str, Tensor]]


def _contributions(step: int) -> list[Tensor]:
    return gradients(step, SHAPES, rank=dist.get_rank(), world_size=dist.get_world_size())


def _stepped(model: nn.Module, optimizer: Any, step: int) -> None:
    model(_contributions(step)).backward()
    optimizer.step()
    optimizer.zero_grad()


def _own_values(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().float().clone() for name, param in model.named_parameters()}


def _plain(groups: int, seed: int) -> Trained:
    model = Model(SHAPES, seed=seed)
    optimizer = make_optimizer(GROUPS[groups](model))

    def step(number: int) -> None:
        for param, grad in zip(model.parameters(), gradients(number, SHAPES), strict=True):
            param.grad = grad
        optimizer.step()

    return Trained(model=model, optimizer=optimizer, step=step, whole=partial(_own_values, model))


def _ddp(groups: int, seed: int) -> Trained:
    model = Model(SHAPES, seed=seed)
    wrapped = DistributedDataParallel(model)
    optimizer = make_optimizer(GROUPS[groups](model))
    return Trained(model=wrapped, optimizer=optimizer, step=partial(_stepped, wrapped, optimizer), whole=partial(_own_values, model))


def _dtensors(groups: int, seed: int, shard: Callable[[nn.Module], None]) -> Trained:
    """Gradients are given as each rank's part of them."""
    indices = Model(SHAPES)
    with torch.no_grad():
        for param in indices.parameters():
            param.copy_(torch.arange(param.numel(), dtype=torch.float32).view(param.shape))
    shard(indices)  # so that each element tells where it comes from
    held = {name: param.to_local().detach().long() for name, param in indices.named_parameters()}
    model = Model(SHAPES, seed=seed)
    shard(model)
    optimizer = make_optimizer(GROUPS[groups](model))

    def step(number: int) -> None:
        for (name, param), grad in zip(model.named_parameters(), gradients(number, SHAPES), strict=True):
            local = grad.flatten()[held[name]]
            options = {"run_check": False, "shape": param.shape, "stride": param.stride()}
            param.grad = DTensor.from_local(local, param.device_mesh, param.placements, **options)
        optimizer.step()

    def whole() -> dict[str, Tensor]:
        own = {name: (held[name].flatten(), param.to_local().detach().flatten()) for name, param in model.named_parameters()}
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        found = {name: torch.full((param.numel(),), torch.nan) for name, param in model.named_parameters()}
        for part in parts:
            for name, (places, values) in part.items():
                found[name][places] = values
        return {name: found[name].view(param.shape) for name, param in model.named_parameters()}

    return Trained(model=model, optimizer=optimizer, step=step, whole=whole)


def _fully_shard(model: nn.Module, replicas: int = 1) -> None:
    sizes = (dist.get_world_size(),) if replicas == 1 else (replicas, dist.get_world_size() // replicas)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])
    for layer in model.layers:  # pyright: ignore[reportGeneralTypeIssues]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _tensor_parallel(model: nn.Module) -> None:
    """Rows or columns over two ranks, and FSDP2 over the others."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    for number, layer in enumerate(model.layers):  # pyright: ignore[reportArgumentType]
        for name, param in list(layer.named_parameters()):
            placement = Replicate() if param.ndim < 2 else Shard(number % 2)
            layer.register_parameter(name, nn.Parameter(distribute_tensor(param.detach(), mesh["tensor"], [placement])))
    fully_shard(model, mesh=mesh["data"])


def _fsdp1(groups: int, seed: int, *, use_orig_params: bool) -> Trained:
    options: dict[str, Any] = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
    model = Model(SHAPES, seed=seed)
    for index in (0, 3, 5):
        model.layers[index] = FullyShardedDataParallel(model.layers[index], **options)
    wrapped = FullyShardedDataParallel(model, **options)
    optimizer = make_optimizer(GROUPS[groups](wrapped), layout=so.fsdp1_layout(wrapped))

    def whole() -> dict[str, Tensor]:
        with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
            return {name.replace("_fsdp_wrapped_module.", ""): value for name, value in _own_values(wrapped).items()}

    return Trained(model=wrapped, optimizer=optimizer, step=partial(_stepped, wrapped, optimizer), whole=whole)


def _zero(groups: int, seed: int, *, stage: int, dtype: torch.dtype = torch.float32) -> Trained:
    model = Model(SHAPES, seed=seed).to(dtype)
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "bucket_mb": 0.002, "stage": stage, "module": model}
    optimizer = so.ShardedOptimizer(GROUPS[groups](model), so.StableAdamW, **options)

    def whole() -> dict[str, Tensor]:
        optimizer.wait()
        if dtype == torch.float32:
            return _own_values(model)
        shards = [
            {
                name: (optimizer.state_dict()["shards"][number]["start"], optimizer.state[param]["master"].clone())
                for number, (name, param) in _numbered(model, optimizer)
                if param in optimizer.state
            }
        ]
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, shards[0])
        found = {name: torch.full((param.numel(),), torch.nan) for name, param in model.named_parameters()}
        for part in parts:
            for name, (start, values) in part.items():
                found[name][start : start + values.numel()] = values
        masters = {name: found[name].view(param.shape) for name, param in model.named_parameters()}
        for name, param in model.named_parameters():
            assert torch.equal(param, masters[name].to(dtype)), f"{name} is not its rounded master"
        return masters

    return Trained(model=model, optimizer=optimizer, step=partial(_stepped, model, optimizer), whole=whole)


def _numbered(model: nn.Module, optimizer: Any) -> Sequence[tuple[int, tuple[str, Tensor]]]:
    """The model's parameters, with the numbers that the optimizer's state dict gives them."""
    names = {param: name for name, param in model.named_parameters()}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [(number, (names[param], param)) for number, param in enumerate(params)]


def _deepspeed(groups: int, seed: int, *, stage: int, dtype: torch.dtype = torch.float32, **options: Any) -> Trained:
    model = Model(SHAPES, seed=seed)
    names = dict(model.named_parameters())
    config = deepspeed_models.config_of(stage, dtype, **options)
    engine, *_ = so.deepspeed.initialize(model=model, optimizer=make_optimizer(GROUPS[groups](model)), config=config)

    def step(number: int) -> None:
        deepspeed_models.train(engine, number, number, SHAPES)

    def whole() -> dict[str, Tensor]:
        found = deepspeed_models.whole(engine)
        return {name: found[name].detach().clone() for name in names}

    return Trained(model=engine, optimizer=engine.optimizer, step=step, whole=whole)


BF16 = torch.bfloat16
SUB_GROUPS = {"sub_group_size": 150}
WRAPPERS: dict[str, Callable[[int, int], Trained]] = {
    "plain": _plain,
    "ddp": _ddp,
    "fsdp2": partial(_dtensors, shard=_fully_shard),
    "hsdp": partial(_dtensors, shard=partial(_fully_shard, replicas=2)),
    "fsdp2_tp": partial(_dtensors, shard=_tensor_parallel),
    "fsdp1": partial(_fsdp1, use_orig_params=True),
    "fsdp1_flat": partial(_fsdp1, use_orig_params=False),
    "zero1": partial(_zero, stage=1),
    "zero2": partial(_zero, stage=2),
    "zero2_bf16": partial(_zero, stage=2, dtype=BF16),
    "deepspeed1": partial(_deepspeed, stage=1),
    "deepspeed2": partial(_deepspeed, stage=2, round_robin_gradients=True),
    "deepspeed3": partial(_deepspeed, stage=3, stage3_param_persistence_threshold=0, **SUB_GROUPS),
    "deepspeed0_bf16": partial(_deepspeed, stage=0, dtype=BF16),
    "deepspeed1_bf16": partial(_deepspeed, stage=1, dtype=BF16, top={"data_types": {"grad_accum_dtype": "fp32"}}),
    "deepspeed2_bf16": partial(_deepspeed, stage=2, dtype=BF16),
    "deepspeed3_bf16": partial(_deepspeed, stage=3, dtype=BF16),  # small parameters stay gathered
}


def worlds_of(wrapper: str) -> Sequence[int]:
    """On how many ranks a wrapper can be."""
    return {"plain": (1,), "hsdp": (4,), "fsdp2_tp": (2, 4)}.get(wrapper, (1, 2, 3, 4))
