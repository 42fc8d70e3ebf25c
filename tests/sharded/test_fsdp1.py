"""FullyShardedDataParallel: the bits of an unsharded optimizer that is given the same gradients, whatever it flattens together."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from collectives import collectives_of
from deepspeed_models import AWKWARD
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy, StateDictType

import sharded_optim as so
from benchmarks.given_gradients import Model, gradients, one_group, two_groups, unsharded

pytestmark = pytest.mark.filterwarnings("ignore:weight_decay")

STEPS = 10
CPU = torch.device("cpu")
STABLE = partial(so.StableAdamW, lr=1e-2, weight_decay=0.1)
ADAMW = partial(so.AdamW, lr=1e-2, weight_decay=0.1)


def wrapped(*, units: bool = False, **options: Any) -> FullyShardedDataParallel:
    model = Model(AWKWARD)
    if units:
        for index in (0, 3, 5):
            model.layers[index] = FullyShardedDataParallel(model.layers[index], device_id=CPU, **options)
    return FullyShardedDataParallel(model, device_id=CPU, **options)


def train(model: nn.Module, optimizer: Any, first: int = 1, last: int = STEPS) -> None:
    for step in range(first, last + 1):
        model(gradients(step, AWKWARD, rank=dist.get_rank(), world_size=dist.get_world_size())).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(model: FullyShardedDataParallel) -> dict[str, Tensor]:
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return {name.replace("_fsdp_wrapped_module.", ""): param.detach().clone() for name, param in model.named_parameters()}


def check_bits(strategies: list[ShardingStrategy], makers: list[Any]) -> None:
    expected = {(make, groups): unsharded(make, STEPS, AWKWARD, groups=groups) for make in makers for groups in (one_group, two_groups)}
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    low = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    for strategy in strategies:
        hybrid = {"device_mesh": mesh} if strategy == ShardingStrategy.HYBRID_SHARD else {}
        for orig in (True, False):
            for options in ({}, {"units": True}, {"units": True, "mixed_precision": low}):
                for make in makers:
                    groups = two_groups if orig else one_group
                    model = wrapped(use_orig_params=orig, sharding_strategy=strategy, **options, **hybrid)
                    optimizer = make(groups(model), layout=so.fsdp1_layout(model))
                    train(model, optimizer)
                    where = f"{strategy} {orig=} {options} {make.func.__name__}"
                    outcome = expected[make, groups]
                    for name, value in whole(model).items():
                        assert torch.equal(value, outcome.params[name]), f"{where} {name}"
                    assert {float(state["step"]) for state in optimizer.state.values()} == {STEPS}, where
                    for key in ("exp_avg", "exp_avg_sq"):
                        with torch.no_grad():
                            for param in model.parameters():
                                param.copy_(optimizer.state[param][key])
                        for name, value in whole(model).items():
                            assert torch.equal(value, outcome.state[name][key]), f"{where} {key} of {name}"


FULL, GRADS, NONE, HYBRID = (
    ShardingStrategy.FULL_SHARD,
    ShardingStrategy.SHARD_GRAD_OP,
    ShardingStrategy.NO_SHARD,
    ShardingStrategy.HYBRID_SHARD,
)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("world_size", "strategies", "makers"), [(2, [FULL, GRADS, NONE], [STABLE, ADAMW]), (4, [FULL, HYBRID], [STABLE])])
def test_every_strategy_and_mode_gives_the_bits_of_the_unsharded_optimizer(
    world_size: int, strategies: list[ShardingStrategy], makers: list[Any]
) -> None:
    """Parameters, moments and step counters; several units, mixed precision, param groups."""
    ranks.run(check_bits, world_size, strategies, makers)


def check_rest() -> None:
    for orig in (True, False):
        for make, expected in ((STABLE, ["gloo:all_reduce"]), (ADAMW, [])):
            model = wrapped(units=True, use_orig_params=orig)
            optimizer = make(model.parameters(), layout=so.fsdp1_layout(model))
            train(model, optimizer, 1, 1)
            model(gradients(2, AWKWARD)).backward()
            assert collectives_of(optimizer.step) == expected, orig
        check_metrics(model, optimizer, orig=orig)
        check_refusals(orig=orig)
        check_private_attributes(orig=orig)
    check_layout_is_found()
    check_loading_before_a_step()
    check_groups()
    check_padding_alone()


def check_metrics(model: nn.Module, optimizer: Any, *, orig: bool) -> None:
    """Norms of whole tensors under their own names, also of tensors that a flat parameter holds together."""
    found: dict[str, Any] = {}
    for name, param in model.named_parameters():
        optimizer.report_per_parameter_metrics(param, name.replace("_fsdp_wrapped_module.", ""), found)
    optimizer.pre_reduce_metrics(found)
    optimizer.dist_reduce_metrics(found)
    for name, value in whole(model).items():
        torch.testing.assert_close(found[f"l2_norm/param/{name}"].float(), torch.linalg.vector_norm(value), msg=f"{orig=} {name}")
    for name, grad in zip(whole(model), gradients(2, AWKWARD), strict=True):
        torch.testing.assert_close(found[f"l2_norm/grad/{name}"].float(), torch.linalg.vector_norm(grad), msg=f"{orig=} {name}")


def check_layout_is_found() -> None:
    """Without layout=, of an optimizer that is built after wrapping and, as by Accelerate, of one that was built before: the bits of one
    that was given it, whole names, and state for who asks before the first step.
    """
    for orig in (True, False):
        for make in (STABLE, ADAMW):
            models = [wrapped(units=True, use_orig_params=orig) for _ in range(2)]
            optimizers = [make(models[0].parameters(), layout=so.fsdp1_layout(models[0])), make(models[1].parameters())]
            if orig:
                plain = Model(AWKWARD)
                early = make(plain.parameters())
                models.append(FullyShardedDataParallel(plain, use_orig_params=True, device_id=CPU))
                optimizers.append(early)
            for model, optimizer in zip(models, optimizers, strict=True):
                train(model, optimizer, 1, 3)
                for name, value in whole(model).items():
                    assert torch.equal(value, whole(models[0])[name]), f"{orig=} {name}"
            assert [each.metrics() for each in optimizers] == [optimizers[0].metrics()] * len(optimizers)


def check_loading_before_a_step() -> None:
    """As Accelerate loads: FSDP is asked for the state of an optimizer that has not stepped, and what it names is loaded."""
    with broadcast_folder() as folder:
        for make in (STABLE, ADAMW):
            models = [wrapped(units=True, use_orig_params=True) for _ in range(2)]
            optimizers = [make(model.parameters()) for model in models]
            train(models[0], optimizers[0], 1, 2)
            for model, optimizer in zip(models, optimizers, strict=True):
                with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
                    content = {"model": model.state_dict(), "optimizer": FullyShardedDataParallel.optim_state_dict(model, optimizer)}
                    if optimizer is optimizers[0]:
                        dcp.save(content, checkpoint_id=f"{folder}/{make.func.__name__}")
                        continue
                    # With True, torch 2.13 takes a rank that has nothing of some tensor for one that reads a checkpoint of torch 2.3.
                    planner = DefaultLoadPlanner(flatten_sharded_tensors=False)
                    dcp.load(content, checkpoint_id=f"{folder}/{make.func.__name__}", planner=planner)
                    model.load_state_dict(content["model"])
                    optimizer.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, content["optimizer"]))
            for model, optimizer in zip(models, optimizers, strict=True):
                train(model, optimizer, 3, 4)
            for name, value in whole(models[0]).items():
                assert torch.equal(value, whole(models[1])[name]), f"{make.func.__name__} {name}"
            assert {float(state["step"]) for state in optimizers[1].state.values()} == {4.0}


@contextmanager
def broadcast_folder() -> Iterator[str]:
    """One that all ranks know."""
    with tempfile.TemporaryDirectory() as own:
        folders = [own]
        dist.broadcast_object_list(folders)
        yield folders[0]
        dist.barrier()


def check_refusals(*, orig: bool) -> None:
    model = wrapped(use_orig_params=orig)
    parts = nn.Sequential(wrapped(use_orig_params=orig), wrapped(use_orig_params=orig))
    for params in (parts.parameters(), [*model.parameters(), nn.Parameter(torch.ones(3))]):
        with pytest.raises(
            ValueError, match=r"no one module of it holds all.*layout=so\.fsdp1_layout.*unwrap_optimizer\(optimizer\)\.layout"
        ):
            STABLE(params)
    STABLE(parts.parameters(), layout=so.fsdp1_layout(parts))
    layout = so.fsdp1_layout(model)
    with pytest.raises(ValueError, match=r"parameter 'own' .*is not one of the FullyShardedDataParallel model.*use_orig_params=True"):
        STABLE([("own", nn.Parameter(torch.ones(3)))], layout=layout)
    with pytest.raises(ValueError, match=r"no parameters that FullyShardedDataParallel has flattened"):
        so.fsdp1_layout(Model(AWKWARD))
    optimizer = STABLE(model.parameters(), layout=layout)
    model(gradients(1, AWKWARD)).backward()
    with (
        FullyShardedDataParallel.summon_full_params(model, with_grads=orig),
        pytest.raises(ValueError, match=r"this rank's shard of it has \d+ elements.*outside of what gathers whole parameters"),
    ):
        optimizer.step()
    optimizer.step()
    strided = nn.Linear(6, 4)
    strided.weight.data = torch.randn(6, 4).t()
    with pytest.raises(ValueError, match=r"parameter 'weight' of shape \(4, 6\) was not contiguous.*before wrapping"):
        so.fsdp1_layout(FullyShardedDataParallel(strided, use_orig_params=orig, device_id=CPU))


def check_private_attributes(*, orig: bool) -> None:
    model = wrapped(use_orig_params=orig)
    flat_param = model._handle.flat_param
    for name in ("_fqns", "_shapes", "_contiguities", "_param_extensions", "_shard_param_infos", "_params", "_sharded_size"):
        assert hasattr(flat_param, name), f"torch {torch.__version__} has moved FlatParameter.{name}: mend sharding/fsdp1.py"
    assert all(getattr(param, "_fsdp_flattened", False) for param in model.parameters()), f"torch {torch.__version__} marks FSDP1 otherwise"


def check_groups() -> None:
    """Weight decay by the dimensions of whole tensors: a flat parameter has one, and so has each view of it."""
    model = wrapped(use_orig_params=True)
    without, decaying = so.param_groups_weight_decay(model, 0.1)
    names = {param: name for name, param in model.named_parameters()}
    matrices = {name for name, param in Model(AWKWARD).named_parameters() if param.ndim > 1 and not name.endswith("bias")}
    assert {names[param].replace("_fsdp_wrapped_module.", "") for param in decaying["params"]} == matrices
    assert without["weight_decay"] == 0.0
    with pytest.raises(ValueError, match=r"'layers\.0\.weight' decays and 'layers\.0\.bias' does not, but FullyShardedDataParallel has"):
        so.param_groups_weight_decay(wrapped(use_orig_params=False))
    pure = FullyShardedDataParallel(nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 2, bias=False)), device_id=CPU)
    (group,) = so.param_groups_weight_decay(pure, 0.1)
    assert group["weight_decay"] == 0.1


def check_padding_alone() -> None:
    """A rank that holds nothing but padding of a flat parameter counts its steps like the others: whole state has one counter."""
    model = FullyShardedDataParallel(nn.Linear(1, 1, bias=False), device_id=CPU)
    optimizer = STABLE(model.parameters(), layout=so.fsdp1_layout(model))
    for _ in range(2):
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
    (param,) = model.parameters()
    assert optimizer.state[param]["step"] == 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_collectives_metrics_refusals_groups_and_private_attributes() -> None:
    ranks.run(check_rest, 2)
