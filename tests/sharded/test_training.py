"""Whole training steps under torch's own wrappers, and checkpoints through torch.distributed.checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from variants import AmsgradAdamW, MomentumSGDW

import sharded_optim as so

STEPS = 10
CLASSES = [so.Adam, so.AdamW, AmsgradAdamW, MomentumSGDW, so.StableAdamW]
# Whose checkpoints, nested or flattened, are tried under the first and under the second of two wrappers.
SOME = ([(so.Adam, False), (AmsgradAdamW, True)], [(so.AdamW, True), (MomentumSGDW, False)])


class Model(nn.Sequential):
    """Layers of prime widths, behind a norm."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.LayerNorm(17), nn.Linear(17, 34), nn.Tanh(), nn.Linear(34, 29), nn.Tanh(), nn.Linear(29, 5))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int, world_size: int) -> None:
    """Spiky losses; each rank takes its rows of one global batch of 12."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(12, 17, generator=generator)[rank::world_size]
        optimizer.zero_grad()
        (model(x).square().mean() * {3: 100.0, 6: 30.0, 8: 300.0}.get(step, 1.0)).backward()
        optimizer.step()


def full_values(model: nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def fsdp2(model: Model, mesh: DeviceMesh | None = None) -> Model:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp2_bf16(model: Model) -> Model:
    """Parameters in bfloat16, whose Kahan compensation is state too."""
    model.to(torch.bfloat16).register_forward_pre_hook(lambda _, inputs: (inputs[0].to(torch.bfloat16),))
    return fsdp2(model)


def hsdp(model: Model) -> Model:
    return fsdp2(model, init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard")))


def tp(model: Model) -> Model:
    """With a sequence-parallel norm, whose gradients nothing but the step reduces."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"0": SequenceParallel(sequence_dim=0), "1": ColwiseParallel(input_layouts=Shard(0)), "3": RowwiseParallel()}
    parallelize_module(model, mesh, plan)
    return model


def fsdp2_tp(model: Model) -> Model:
    """With a sequence-parallel norm, whose gradients tensor parallelism leaves Partial until FSDP2 reduces them."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    plan = {"0": SequenceParallel(sequence_dim=0), "1": ColwiseParallel(input_layouts=Shard(0)), "3": RowwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    return fsdp2(model, mesh["dp"])


def check_training(folder: str, wrappers: dict[str, tuple[Callable[[Model], nn.Module], int]]) -> None:
    for name, (wrap, model_parallel) in wrappers.items():
        rank, world_size = dist.get_rank() // model_parallel, dist.get_world_size() // model_parallel
        for cls in CLASSES:
            expected = torch.load(Path(folder) / f"{cls.__name__}.pt")
            model = wrap(Model())
            optimizer = cls(model.parameters(), lr=1e-2)
            train(model, optimizer, range(STEPS), rank, world_size)
            for actual, value in zip(full_values(model), expected, strict=True):
                # Gradients are summed in another order than in one process, so this is not bitwise.
                assert (actual - value).norm() / value.norm() < 5e-6, (name, cls)


def check_checkpoints(folder: str, wrappers: dict[Callable[[Model], nn.Module], int], everything: bool) -> None:
    """Bitwise the same trajectory after saving and loading, nested and flattened, also asked of an optimizer that holds gradients.

    Unless everything is asked for, StableAdamW is both under both of two wrappers, and any other class one of them under one.
    """
    for (wrap, model_parallel), some in zip(wrappers.items(), SOME, strict=True):
        for cls in CLASSES:
            for flatten in (False, True):
                if everything or cls is so.StableAdamW or (cls, flatten) in some:
                    check_checkpoint(folder, wrap, model_parallel, cls, flatten)


def check_checkpoint(folder: str, wrap: Callable[[Model], nn.Module], model_parallel: int, cls: Callable[..., Any], flatten: bool) -> None:
    rank, world_size = dist.get_rank() // model_parallel, dist.get_world_size() // model_parallel
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    path = str(Path(folder) / f"{wrap.__name__}-{cls.__name__}-{flatten}")
    straight = wrap(Model())
    optimizer = cls(straight.parameters(), lr=1e-2)
    train(straight, optimizer, range(5), rank, world_size)
    model_state, optimizer_state = get_state_dict(straight, optimizer, options=options)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
    train(straight, optimizer, range(5, STEPS), rank, world_size)

    resumed = wrap(Model())
    fresh = cls(resumed.parameters(), lr=0.5)
    model_state, optimizer_state = get_state_dict(resumed, fresh, options=options)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
    set_state_dict(resumed, fresh, model_state_dict=model_state, optim_state_dict=optimizer_state, options=options)
    train(resumed, fresh, range(5, STEPS), rank, world_size)
    for actual, value in zip(full_values(resumed), full_values(straight), strict=True):
        assert torch.equal(actual, value)


def check_parameters_replaced_after_construction() -> None:
    """An optimizer built before fully_shard takes its first step on the DTensors that replaced its parameters."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for cls in CLASSES:
        early = Model()
        optimizer = cls(early.parameters(), lr=1e-2)
        fully_shard(early, mesh=init_device_mesh("cpu", (world_size,)))
        optimizer.param_groups[0]["params"] = list(early.parameters())
        late = Model()
        fully_shard(late, mesh=init_device_mesh("cpu", (world_size,)))
        train(early, optimizer, range(3), rank, world_size)
        train(late, cls(late.parameters(), lr=1e-2), range(3), rank, world_size)
        for a, b in zip(full_values(early), full_values(late), strict=True):
            assert torch.equal(a, b)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the parameters after training in one process."""
    folder = tmp_path_factory.mktemp("one_process")
    for cls in CLASSES:
        model = Model()
        train(model, cls(model.parameters(), lr=1e-2), range(STEPS), 0, 1)
        torch.save(full_values(model), folder / f"{cls.__name__}.pt")
    return str(folder)


def check_two_ranks(one_process: str, folder: str, everything: bool) -> None:
    check_training(one_process, {"FSDP2": (fsdp2, 1), "DDP": (DistributedDataParallel, 1), "TP": (tp, 2)})
    check_checkpoints(folder, {fsdp2: 1, fsdp2_bf16: 1}, everything)
    check_parameters_replaced_after_construction()


def test_fsdp2_and_ddp_train_like_one_process_and_resume_bitwise(one_process: str, tmp_path: Path, everything: bool) -> None:
    ranks.run(check_two_ranks, 2, one_process, str(tmp_path), everything)


def check_four_ranks(one_process: str, folder: str, everything: bool) -> None:
    check_training(one_process, {"HSDP": (hsdp, 1), "FSDP2+TP": (fsdp2_tp, 2)})
    check_checkpoints(folder, {hsdp: 1, fsdp2_tp: 2}, everything)


def test_hsdp_and_fsdp2_with_tensor_parallelism_train_like_one_process_and_resume_bitwise(
    one_process: str, tmp_path: Path, everything: bool
) -> None:
    ranks.run(check_four_ranks, 4, one_process, str(tmp_path), everything)
