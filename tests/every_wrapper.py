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
from benchmarks.given_gradients import Groups, Model, Outcome, Shapes, gradients, one_group, two_groups, unsharded

__all__ = ["RECIPES", "WRAPPERS", "Recipe", "Trained", "recipes_of", "worlds_of"]

UNITS = (0, 3, 5)  # layers that FSDP1 flattens alone; the others it flattens together


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained.

    Attributes:
        shapes: of the model.
        groups: makes the param groups of a model.
        optimizer_class, options: of this library, and what it is given.
    """

    shapes: Shapes
    groups: Callable[[nn.Module], Groups]
    optimizer_class: type[Any]
    options: Mapping[str, Any]

    def model(self, seed: int) -> Model:
        return Model(self.shapes, seed=seed)

    def optimizer(self, model: nn.Module, **further: Any) -> Any:
        return self.optimizer_class(self.groups(model), **self.options, **further)

    def contributions(self, step: int) -> list[Tensor]:
        """Of this rank."""
        return gradients(step, self.shapes, rank=dist.get_rank(), world_size=dist.get_world_size())

    def in_one_process(self, steps: int) -> Outcome:
        return unsharded(partial(self.optimizer_class, **self.options), steps, self.shapes, groups=self.groups)


def muon_groups(model: nn.Module) -> Groups:
    """Matrices and stacks of them, which are the layers `UNITS`; and the rest."""
    named = list(model.named_parameters())
    matrices = [param for name, param in named if any(f"layers.{number}." in name for number in UNITS)]
    rest = {"algorithm": "stable_adamw", "lr": 3e-3, "weight_decay": 0.0}
    return [{"params": matrices}, {"params": [param for _, param in named if not any(param is each for each in matrices)], **rest}]


SHAPES: Shapes = (((7, 3), (7,)), ((1,),), ((5,),), ((33, 17), (33,)), ((3, 5, 2),), ((64, 41), (64,)))
MATRICES: Shapes = (((7, 3), (1, 9)), ((1,),), ((5,),), ((33, 17), (5, 29)), ((6,),), ((64, 41), (3, 5, 2)))
STABLE_ADAMW: Mapping[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
RECIPES: Mapping[str, Recipe] = {
    "one group": Recipe(shapes=SHAPES, groups=one_group, optimizer_class=so.StableAdamW, options=STABLE_ADAMW),
    "two groups": Recipe(shapes=SHAPES, groups=two_groups, optimizer_class=so.StableAdamW, options=STABLE_ADAMW),
    "muon": Recipe(shapes=MATRICES, groups=muon_groups, optimizer_class=so.Muon, options={"lr": 2e-2}),
}


def recipes_of(wrapper: str) -> Sequence[str]:
    """The recipes that a wrapper can train: a flat parameter has weights and biases, which cannot be in different groups."""
    return [name for name in RECIPES if wrapper != "fsdp1_flat" or name != "two groups"]


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


def _stepped(recipe: Recipe, model: nn.Module, optimizer: Any, step: int) -> None:
    model(recipe.contributions(step)).backward()
    optimizer.step()
    optimizer.zero_grad()


def _own_values(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().float().clone() for name, param in model.named_parameters()}


def _plain(recipe: Recipe, seed: int) -> Trained:
    model = recipe.model(seed)
    optimizer = recipe.optimizer(model)

    def step(number: int) -> None:
        for param, grad in zip(model.parameters(), gradients(number, recipe.shapes), strict=True):
            param.grad = grad
        optimizer.step()

    return Trained(model=model, optimizer=optimizer, step=step, whole=partial(_own_values, model))


def _ddp(recipe: Recipe, seed: int) -> Trained:
    model = recipe.model(seed)
    wrapped = DistributedDataParallel(model)
    optimizer = recipe.optimizer(model)
    return Trained(
        model=wrapped, optimizer=optimizer, step=partial(_stepped, recipe, wrapped, optimizer), whole=partial(_own_values, model)
    )


def _dtensors(recipe: Recipe, seed: int, shard: Callable[[nn.Module], None]) -> Trained:
    """Gradients are given as each rank's part of them."""
    indices = recipe.model(0)
    with torch.no_grad():
        for param in indices.parameters():
            param.copy_(torch.arange(param.numel(), dtype=torch.float32).view(param.shape))
    shard(indices)  # so that each element tells where it comes from
    held = {name: param.to_local().detach().long() for name, param in indices.named_parameters()}
    model = recipe.model(seed)
    shard(model)
    optimizer = recipe.optimizer(model)

    def step(number: int) -> None:
        for (name, param), grad in zip(model.named_parameters(), gradients(number, recipe.shapes), strict=True):
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


def _fsdp1(recipe: Recipe, seed: int, *, use_orig_params: bool) -> Trained:
    options: dict[str, Any] = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
    model = recipe.model(seed)
    for index in UNITS:
        model.layers[index] = FullyShardedDataParallel(model.layers[index], **options)
    wrapped = FullyShardedDataParallel(model, **options)
    optimizer = recipe.optimizer(wrapped, layout=so.fsdp1_layout(wrapped))

    def whole() -> dict[str, Tensor]:
        with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
            return {name.replace("_fsdp_wrapped_module.", ""): value for name, value in _own_values(wrapped).items()}

    return Trained(model=wrapped, optimizer=optimizer, step=partial(_stepped, recipe, wrapped, optimizer), whole=whole)


def _zero(recipe: Recipe, seed: int, *, stage: int, dtype: torch.dtype = torch.float32) -> Trained:
    model = recipe.model(seed).to(dtype)
    options = {**recipe.options, "bucket_mb": 0.002, "stage": stage, "module": model}
    optimizer = so.ShardedOptimizer(recipe.groups(model), recipe.optimizer_class, **options)

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

    return Trained(model=model, optimizer=optimizer, step=partial(_stepped, recipe, model, optimizer), whole=whole)


def _numbered(model: nn.Module, optimizer: Any) -> Sequence[tuple[int, tuple[str, Tensor]]]:
    """The model's parameters, with the numbers that the optimizer's state dict gives them."""
    names = {param: name for name, param in model.named_parameters()}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [(number, (names[param], param)) for number, param in enumerate(params)]


def _deepspeed(recipe: Recipe, seed: int, *, stage: int, dtype: torch.dtype = torch.float32, **options: Any) -> Trained:
    model = recipe.model(seed)
    names = dict(model.named_parameters())
    config = deepspeed_models.config_of(stage, dtype, **options)
    engine, *_ = so.deepspeed.initialize(model=model, optimizer=recipe.optimizer(model), config=config)

    def step(number: int) -> None:
        deepspeed_models.train(engine, number, number, recipe.shapes)

    def whole() -> dict[str, Tensor]:
        found = deepspeed_models.whole(engine)
        return {name: found[name].detach().clone() for name in names}

    return Trained(model=engine, optimizer=engine.optimizer, step=step, whole=whole)


BF16 = torch.bfloat16
SUB_GROUPS = {"sub_group_size": 150}
WRAPPERS: dict[str, Callable[[Recipe, int], Trained]] = {
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
