"""FullyShardedDataParallel: the bits of an unsharded optimizer that is given the same gradients, whatever it flattens together."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
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

pytestmark = [pytest.mark.filterwarnings("ignore:weight_decay"), pytest.mark.filterwarnings("ignore::FutureWarning")]

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


FULL, GRADS, NONE, HYBRID = (
    ShardingStrategy.FULL_SHARD,
    ShardingStrategy.SHARD_GRAD_OP,
    ShardingStrategy.NO_SHARD,
    ShardingStrategy.HYBRID_SHARD,
)
LOW = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
both_modes = pytest.mark.parametrize("orig", [True, False], ids=["use_orig_params", "flat_params"])
both_optimizers = pytest.mark.parametrize("make", [STABLE, ADAMW], ids=["StableAdamW", "AdamW"])


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("world_size", "strategy", "make"),
    [*((2, strategy, make) for strategy in (FULL, GRADS, NONE) for make in (STABLE, ADAMW)), (4, FULL, STABLE), (4, HYBRID, STABLE)],
)
@both_modes
def test_every_strategy_and_mode_gives_the_bits_of_the_unsharded_optimizer(
    world_size: int, strategy: ShardingStrategy, make: partial, orig: bool
) -> None:
    """Parameters, moments and step counters; several units, mixed precision, param groups."""
    groups = two_groups if orig else one_group
    expected = unsharded(make, STEPS, AWKWARD, groups=groups)
    hybrid = {}
    if strategy == ShardingStrategy.HYBRID_SHARD:
        hybrid["device_mesh"] = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    for options in ({}, {"units": True}, {"units": True, "mixed_precision": LOW}):
        model = wrapped(use_orig_params=orig, sharding_strategy=strategy, **options, **hybrid)
        optimizer = make(groups(model), layout=so.fsdp1_layout(model))
        train(model, optimizer)
        for name, value in whole(model).items():
            assert torch.equal(value, expected.params[name]), f"{options} {name}"
        assert {float(state["step"]) for state in optimizer.state.values()} == {STEPS}, options
        for key in ("exp_avg", "exp_avg_sq"):
            with torch.no_grad():
                for param in model.parameters():
                    param.copy_(optimizer.state[param][key])
            for name, value in whole(model).items():
                assert torch.equal(value, expected.state[name][key]), f"{options} {key} of {name}"


@pytest.mark.ranks(2)
@both_modes
@pytest.mark.parametrize(("make", "expected"), [(STABLE, ["gloo:all_reduce"]), (ADAMW, [])], ids=["StableAdamW", "AdamW"])
def test_a_step_is_one_all_reduce_where_ranks_agree_and_else_none(orig: bool, make: partial, expected: list[str]) -> None:
    model = wrapped(units=True, use_orig_params=orig)
    optimizer = make(model.parameters(), layout=so.fsdp1_layout(model))
    train(model, optimizer, 1, 1)
    model(gradients(2, AWKWARD)).backward()
    assert collectives_of(optimizer.step) == expected


@pytest.mark.ranks(2)
@both_modes
def test_metrics_are_norms_of_whole_tensors_under_their_own_names(orig: bool) -> None:
    """Also of tensors that a flat parameter holds together."""
    model = wrapped(units=True, use_orig_params=orig)
    optimizer = ADAMW(model.parameters(), layout=so.fsdp1_layout(model))
    train(model, optimizer, 1, 1)
    model(gradients(2, AWKWARD)).backward()
    optimizer.step()
    found: dict[str, Any] = {}
    for name, param in model.named_parameters():
        optimizer.report_per_parameter_metrics(param, name.replace("_fsdp_wrapped_module.", ""), found)
    optimizer.pre_reduce_metrics(found)
    optimizer.dist_reduce_metrics(found)
    for name, value in whole(model).items():
        torch.testing.assert_close(found[f"l2_norm/param/{name}"].float(), torch.linalg.vector_norm(value), msg=name)
    for name, grad in zip(whole(model), gradients(2, AWKWARD), strict=True):
        torch.testing.assert_close(found[f"l2_norm/grad/{name}"].float(), torch.linalg.vector_norm(grad), msg=name)


@pytest.mark.ranks(2)
@both_modes
@both_optimizers
def test_the_layout_is_found_without_being_given(orig: bool, make: partial) -> None:
    """Of an optimizer that is built after wrapping and, as by Accelerate, of one that was built before: the bits of one
    that was given it, whole names, and state for who asks before the first step.
    """
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
            assert torch.equal(value, whole(models[0])[name]), name
    assert [each.metrics() for each in optimizers] == [optimizers[0].metrics()] * len(optimizers)


@pytest.mark.ranks(2)
@both_optimizers
def test_state_is_loaded_before_the_first_step(make: partial, tmp_path: Path) -> None:
    """As Accelerate loads: FSDP is asked for the state of an optimizer that has not stepped, and what it names is loaded."""
    models = [wrapped(units=True, use_orig_params=True) for _ in range(2)]
    optimizers = [make(model.parameters()) for model in models]
    train(models[0], optimizers[0], 1, 2)
    for model, optimizer in zip(models, optimizers, strict=True):
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
            content = {"model": model.state_dict(), "optimizer": FullyShardedDataParallel.optim_state_dict(model, optimizer)}
            if optimizer is optimizers[0]:
                dcp.save(content, checkpoint_id=tmp_path)
                continue
            # With True, torch 2.13 takes a rank that has nothing of some tensor for one that reads a checkpoint of torch 2.3.
            planner = DefaultLoadPlanner(flatten_sharded_tensors=False)
            dcp.load(content, checkpoint_id=tmp_path, planner=planner)
            model.load_state_dict(content["model"])
            optimizer.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, content["optimizer"]))
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 3, 4)
    for name, value in whole(models[0]).items():
        assert torch.equal(value, whole(models[1])[name]), name
    assert {float(state["step"]) for state in optimizers[1].state.values()} == {4.0}


@pytest.mark.ranks(2)
@both_modes
def test_parameters_of_several_models_need_a_layout(orig: bool) -> None:
    model = wrapped(use_orig_params=orig)
    parts = nn.Sequential(wrapped(use_orig_params=orig), wrapped(use_orig_params=orig))
    for params in (parts.parameters(), [*model.parameters(), nn.Parameter(torch.ones(3))]):
        with pytest.raises(
            ValueError, match=r"no one module of it holds all.*layout=so\.fsdp1_layout.*unwrap_optimizer\(optimizer\)\.layout"
        ):
            STABLE(params)
    STABLE(parts.parameters(), layout=so.fsdp1_layout(parts))


@pytest.mark.ranks(2)
@both_modes
def test_a_parameter_that_the_layout_does_not_have_is_refused(orig: bool) -> None:
    layout = so.fsdp1_layout(wrapped(use_orig_params=orig))
    with pytest.raises(ValueError, match=r"parameter 'own' .*is not one of the FullyShardedDataParallel model.*use_orig_params=True"):
        STABLE([("own", nn.Parameter(torch.ones(3)))], layout=layout)


def test_a_model_that_is_not_wrapped_has_no_layout() -> None:
    with pytest.raises(ValueError, match=r"no parameters that FullyShardedDataParallel has flattened"):
        so.fsdp1_layout(Model(AWKWARD))


@pytest.mark.ranks(2)
@both_modes
def test_a_step_where_whole_parameters_are_gathered_is_refused(orig: bool) -> None:
    model = wrapped(use_orig_params=orig)
    optimizer = STABLE(model.parameters(), layout=so.fsdp1_layout(model))
    model(gradients(1, AWKWARD)).backward()
    with (
        FullyShardedDataParallel.summon_full_params(model, with_grads=orig),
        pytest.raises(ValueError, match=r"this rank's shard of it has \d+ elements.*outside of what gathers whole parameters"),
    ):
        optimizer.step()
    optimizer.step()


@pytest.mark.ranks(2)
@both_modes
def test_a_parameter_that_was_not_contiguous_is_refused(orig: bool) -> None:
    strided = nn.Linear(6, 4)
    strided.weight.data = torch.randn(6, 4).t()
    with pytest.raises(ValueError, match=r"parameter 'weight' of shape \(4, 6\) was not contiguous.*before wrapping"):
        so.fsdp1_layout(FullyShardedDataParallel(strided, use_orig_params=orig, device_id=CPU))


@pytest.mark.ranks(2)
@both_modes
def test_torch_has_the_private_attributes_that_are_read(orig: bool) -> None:
    model = wrapped(use_orig_params=orig)
    flat_param = model._handle.flat_param
    for name in ("_fqns", "_shapes", "_contiguities", "_param_extensions", "_shard_param_infos", "_params", "_sharded_size"):
        assert hasattr(flat_param, name), f"torch {torch.__version__} has moved FlatParameter.{name}: mend sharding/fsdp1.py"
    assert all(getattr(param, "_fsdp_flattened", False) for param in model.parameters()), f"torch {torch.__version__} marks FSDP1 otherwise"


@pytest.mark.ranks(2)
def test_weight_decay_goes_by_the_dimensions_of_whole_tensors() -> None:
    """A flat parameter has one dimension, and so has each view of it."""
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


@pytest.mark.ranks(2)
def test_a_rank_that_holds_only_padding_counts_its_steps_like_the_others() -> None:
    """Whole state has one counter."""
    model = FullyShardedDataParallel(nn.Linear(1, 1, bias=False), device_id=CPU)
    optimizer = STABLE(model.parameters(), layout=so.fsdp1_layout(model))
    for _ in range(2):
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
    (param,) = model.parameters()
    assert optimizer.state[param]["step"] == 2
