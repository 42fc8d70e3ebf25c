"""Whole training steps under torch's own wrappers, and checkpoints through torch.distributed.checkpoint."""

from __future__ import annotations

from pathlib import Path

import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import sharded_optim as so

STEPS = 10
CLASSES = [so.AdamW, so.DecoupledAdamW, so.StableAdamW]


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(17, 33), nn.Tanh(), nn.Linear(33, 29), nn.Tanh(), nn.Linear(29, 5))


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


def sharded_model() -> nn.Module:
    model = make_model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def check_training(folder: str) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for cls in CLASSES:
        expected = torch.load(Path(folder) / f"{cls.__name__}.pt")
        for model in (sharded_model(), DistributedDataParallel(make_model())):
            optimizer = cls(model.parameters(), lr=1e-2)
            train(model, optimizer, range(STEPS), rank, world_size)
            for actual, value in zip(full_values(model), expected, strict=True):
                # Gradients are summed in another order than in one process, so this is not bitwise.
                assert (actual - value).norm() / value.norm() < 5e-6


def check_checkpoints(folder: str) -> None:
    """Bitwise the same trajectory after saving and loading, nested and flattened, also asked of an optimizer that holds gradients."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for cls in CLASSES:
        for flatten in (False, True):
            options = StateDictOptions(flatten_optimizer_state_dict=flatten)
            path = str(Path(folder) / f"{cls.__name__}-{flatten}")
            straight = sharded_model()
            optimizer = cls(straight.parameters(), lr=1e-2)
            train(straight, optimizer, range(5), rank, world_size)
            model_state, optimizer_state = get_state_dict(straight, optimizer, options=options)
            dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
            train(straight, optimizer, range(5, STEPS), rank, world_size)

            resumed = sharded_model()
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
        early = make_model()
        optimizer = cls(early.parameters(), lr=1e-2)
        fully_shard(early, mesh=init_device_mesh("cpu", (world_size,)))
        optimizer.param_groups[0]["params"] = list(early.parameters())
        late = make_model()
        fully_shard(late, mesh=init_device_mesh("cpu", (world_size,)))
        train(early, optimizer, range(3), rank, world_size)
        train(late, cls(late.parameters(), lr=1e-2), range(3), rank, world_size)
        for a, b in zip(full_values(early), full_values(late), strict=True):
            assert torch.equal(a, b)


def check_all(folder: str) -> None:
    check_training(folder)
    check_checkpoints(folder)
    check_parameters_replaced_after_construction()


def test_fsdp2_and_ddp_train_like_one_process_and_resume_bitwise(tmp_path: Path) -> None:
    for cls in CLASSES:
        model = make_model()
        train(model, cls(model.parameters(), lr=1e-2), range(STEPS), 0, 1)
        torch.save(full_values(model), tmp_path / f"{cls.__name__}.pt")
    ranks.run(check_all, 2, str(tmp_path))
