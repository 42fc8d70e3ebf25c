"""ShardedOptimizer through torch.distributed.checkpoint: saved on some ranks, continued bit for bit on others and under other wrappers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from deepspeed_models import AWKWARD
from test_zero import SMALL, STABLE, assert_like, loss_of, sharded
from torch import Tensor, nn
from torch.distributed._checkpointable import _Checkpointable
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sharded_optim as so
from benchmarks.given_gradients import Model, gradients, one_group, two_groups
from sharded_optim.sharding.segment import Segment, find_tiling_error
from sharded_optim.zero.logical import LogicalTensor, boxes

pytestmark = pytest.mark.filterwarnings("ignore:weight_decay")

KAHAN = partial(so.StableAdamW, lr=1e-2, weight_decay=0.1, kahan_sum=True)
AMSGRAD = partial(so.DecoupledAdamW, lr=1e-2, weight_decay=1e-4, amsgrad=True)
ODD = (*AWKWARD, ((),), ((0, 5),))  # and no dimensions, and no elements
TINY = (((3,),),)  # of which most ranks have nothing
SAVED, LAST = 3, 5  # steps
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FULL = StateDictOptions(full_state_dict=True)
FULL_ON_0 = StateDictOptions(full_state_dict=True, cpu_offload=True)


# ----------------------------------------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 3), (1, 6), (3, 5, 2), (2, 1, 3, 2)])
def test_every_range_of_elements_is_a_few_boxes(shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    values = torch.arange(numel).reshape(shape)
    for start in range(numel + 1):
        for end in range(start, numel + 1):
            found = boxes(shape, start, end - start)
            assert len(found) <= max(1, 2 * len(shape) - 1)
            parts = [values[tuple(slice(a, a + n) for a, n in zip(box.offsets, box.sizes, strict=True))].flatten() for box in found]
            assert torch.equal(torch.cat(parts) if parts else values.flatten()[:0], torch.arange(start, end))
            rest = [Segment.flat("w", shape, 0, start), Segment.flat("w", shape, end, numel - end)]
            assert find_tiling_error([*rest, Segment.flat("w", shape, start, end - start)]) is None


# --------------------------------------------------------------------------------------------------------- a part of a tensor


def test_a_part_of_a_tensor_is_copied_and_moved_and_refuses_everything_else(tmp_path: Path) -> None:
    """Fails where torch renames what makes a tensor checkpointable."""
    local = torch.arange(4.0)
    part = LogicalTensor(local, (3, 3), 2)
    assert isinstance(part, _Checkpointable)
    assert part.shape == (3, 3)
    for other in (part.clone(), copy.deepcopy(part), part.to(torch.float64), part.detach()):
        assert isinstance(other, LogicalTensor)
        assert other.start == 2
        assert torch.equal(other.local.float(), local)
    assert copy.deepcopy(part).local is not part.local
    with pytest.raises(ValueError, match=r"add.* of one rank's part of a tensor; .*full_state_dict=True"):
        _ = part + 1
    with pytest.raises(ValueError, match=r"copy_.*full_state_dict=True"):
        part.copy_(torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"elements \[2, 6\) of shape \(3, 3\).* cannot be pickled.*checkpoint.save"):
        torch.save({"state": part}, tmp_path / "part.pt")


# ------------------------------------------------------------------------------------------------------------------- training


def train(model: nn.Module, optimizer: Any, first: int, last: int, shapes: Any = ODD) -> None:
    """Steps with given gradients, averaged by whoever averages them."""
    for step in range(first, last + 1):
        loss_of(model, gradients(step, shapes, rank=dist.get_rank(), world_size=dist.get_world_size())).backward()
        optimizer.step()
        optimizer.zero_grad()
    if isinstance(optimizer, so.ShardedOptimizer):
        optimizer.wait()


def assign(model: nn.Module, optimizer: Any, first: int, last: int, shapes: Any = ODD) -> None:
    """Steps of an ordinary optimizer with the whole gradients."""
    for step in range(first, last + 1):
        for param, grad in zip(model.parameters(), gradients(step, shapes), strict=True):
            param.grad = grad.to(param.dtype)
        optimizer.step()


def forward(model: nn.Module, optimizer: Any, first: int, last: int, shapes: Any) -> None:
    """Steps of an ordinary optimizer under a wrapper that averages gradients in the passes of a module."""
    for step in range(first, last + 1):
        model(gradients(step, shapes, rank=dist.get_rank(), world_size=dist.get_world_size())).backward()
        optimizer.step()
        optimizer.zero_grad()


def reference(make: partial, groups: Callable[..., Any] = one_group, shapes: Any = ODD, last: int = LAST) -> Any:
    """A model that one process has trained, and its optimizer."""
    return trained(make.func, tuple(make.keywords.items()), groups, shapes, last)


@cache
def trained(cls: type, options: tuple[tuple[str, Any], ...], groups: Callable[..., Any], shapes: Any, last: int) -> Any:
    make = partial(cls, **dict(options))
    model = Model(shapes).to(torch.bfloat16 if make.keywords.get("kahan_sum") else torch.float32)
    optimizer = make(groups(model))
    assign(model, optimizer, 1, last, shapes)
    return model, optimizer


def save(path: Path, model: nn.Module, optimizer: Any, options: StateDictOptions | None = None) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=str(path))


def load(path: Path, model: nn.Module, optimizer: Any, options: StateDictOptions | None = None, planner: Any = None) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=str(path), planner=planner)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=options)


def another(shapes: Any = ODD) -> Model:
    """With other values."""
    return Model(shapes, seed=1)


def fsdp2(model: Model) -> Model:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)  # pyright: ignore
    return fully_shard(model, mesh=mesh)  # pyright: ignore


# ------------------------------------------------------------------------------------------------------------------ on 2 ranks


def check_saving(folder: str) -> None:
    root = Path(folder)
    for name, make, groups in (("stable", STABLE, one_group), ("amsgrad", AMSGRAD, two_groups)):
        model = Model(ODD)
        optimizer = sharded(make, model if groups is one_group else groups(model), bucket_mb=SMALL)
        train(model, optimizer, 1, SAVED)
        save(root / name, model, optimizer)
        save(root / f"{name}-flat", model, optimizer, FLAT)
        check_full(root / f"{name}.pt", make, groups, model, optimizer)
        assert_like(model, optimizer, *reference(make, groups, last=SAVED), "saving changes nothing")
        plain = another()
        ordinary = make(groups(plain))
        assign(plain, ordinary, 1, SAVED)
        check_keys(plain, ordinary, model, optimizer)

    model = Model(TINY)
    optimizer = sharded(STABLE, model)
    train(model, optimizer, 1, SAVED, TINY)
    save(root / "tiny", model, optimizer)
    for name, make in (("masters", STABLE), ("kahan", KAHAN)):
        model = Model(ODD).bfloat16()
        optimizer = sharded(make, model, bucket_mb=SMALL)
        train(model, optimizer, 1, SAVED)
        save(root / name, model, optimizer)
    save_fsdp2_and_ddp(root)


def check_keys(plain: nn.Module, ordinary: Any, model: nn.Module, optimizer: Any) -> None:
    """As of every other optimizer."""
    expected, found = get_optimizer_state_dict(plain, ordinary), get_optimizer_state_dict(model, optimizer)
    assert found["state"].keys() == expected["state"].keys()
    for name, values in expected["state"].items():
        for key, value in found["state"][name].items():
            assert value.shape == values[key].shape, (name, key)
            assert value.dtype == values[key].dtype, (name, key)
        assert values.keys() - found["state"][name].keys() <= ({"step"} if values["exp_avg"].ndim else values.keys())
    for mine, theirs in zip(found["param_groups"], expected["param_groups"], strict=True):
        assert mine == theirs


def check_full(path: Path, make: Callable[..., Any], groups: Callable[..., Any], model: nn.Module, optimizer: Any) -> None:
    """A full state dict is one of an ordinary optimizer, and loads from all ranks' and from rank 0's."""
    whole = get_optimizer_state_dict(model, optimizer, options=FULL)
    other, ordinary = reference(make, groups, last=SAVED)
    expected = get_optimizer_state_dict(other, ordinary)
    assert whole["param_groups"] == expected["param_groups"]
    assert whole["state"].keys() == expected["state"].keys()
    for name, values in expected["state"].items():
        assert whole["state"][name].keys() == values.keys()
        for key, value in values.items():
            assert type(whole["state"][name][key]) is Tensor
            assert torch.equal(whole["state"][name][key], value if value.numel() else torch.zeros_like(value)) or (
                key == "step" and not values["exp_avg"].numel()
            ), (name, key)
    on_0 = get_optimizer_state_dict(model, optimizer, options=FULL_ON_0)
    assert bool(on_0) == (dist.get_rank() == 0)
    if dist.get_rank() == 0:
        torch.save({"model": model.state_dict(), "optimizer": on_0}, path)
    else:
        model.state_dict()
    for saved, options in (
        (whole, FULL),
        (on_0, StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)),
    ):
        resumed = another()
        fresh = sharded(make, resumed if groups is one_group else groups(resumed), bucket_mb=SMALL)
        resumed.load_state_dict(model.state_dict())
        set_optimizer_state_dict(resumed, fresh, copy.deepcopy(saved), options=options)
        train(resumed, fresh, SAVED + 1, LAST)
        assert_like(resumed, fresh, *reference(make, groups), f"full {options}")


def save_fsdp2_and_ddp(root: Path) -> None:
    """Their checkpoints, of ordinary optimizers."""
    for name, make, dtype in (("fsdp2", STABLE, torch.float32), ("kahan-fsdp2", KAHAN, torch.bfloat16)):
        model: nn.Module = fsdp2(Model(AWKWARD).to(dtype))
        optimizer = make(model.parameters())
        forward(model, optimizer, 1, SAVED, AWKWARD)
        save(root / name, model, optimizer)
    model = DistributedDataParallel(Model(AWKWARD))
    optimizer = STABLE(model.parameters())
    forward(model, optimizer, 1, SAVED, AWKWARD)
    save(root / "ddp", model, optimizer)
    model = Model(AWKWARD)
    optimizer = sharded(STABLE, model, bucket_mb=SMALL)
    train(model, optimizer, 1, SAVED, AWKWARD)
    save(root / "zero", model, optimizer)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("has_writer", [False, True])
def test_an_asynchronous_save_has_nothing_of_what_comes_after_the_call(tmp_path: Path, has_writer: bool) -> None:
    """Whoever copies the tensors."""
    writer = dcp.FileSystemWriter(str(tmp_path)) if has_writer else None
    model = Model(ODD)
    optimizer = sharded(STABLE, model, bucket_mb=SMALL)
    train(model, optimizer, 1, SAVED)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    saving: Any = dcp.async_save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=str(tmp_path), storage_writer=writer)
    train(model, optimizer, SAVED + 1, SAVED + 1)
    saving.result()
    dist.barrier()
    resume(tmp_path, STABLE, one_group)


@pytest.mark.ranks(2)
def test_the_optimizer_itself_is_saved_and_loaded_as_an_object_that_has_state(tmp_path: Path) -> None:
    """By dcp.save and dcp.load."""
    model, resumed = Model(ODD), another()
    optimizer, fresh = (sharded(STABLE, each, bucket_mb=SMALL) for each in (model, resumed))
    train(model, optimizer, 1, SAVED)
    dcp.save({"optimizer": optimizer}, checkpoint_id=str(tmp_path))
    resumed.load_state_dict(model.state_dict())
    dcp.load({"optimizer": fresh}, checkpoint_id=str(tmp_path))
    train(resumed, fresh, SAVED + 1, LAST)
    assert_like(resumed, fresh, *reference(STABLE), "itself")


@pytest.mark.ranks(2)
def test_what_is_frozen_is_not_saved_and_what_had_no_gradient_continues_from_its_first_step(tmp_path: Path) -> None:
    """What never had a gradient is saved as zeros."""
    models = [Model(AWKWARD) for _ in range(2)]
    optimizers = []
    for model in models:
        model.layers[3].requires_grad_(False)
        optimizers.append(sharded(STABLE, model, bucket_mb=SMALL))
    for step in range(1, 3):
        some: list[Tensor | None] = [*gradients(step, AWKWARD, rank=dist.get_rank(), world_size=2)]
        some[0] = some[4] = some[5] = None
        loss_of(models[0], some).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
    optimizers[0].wait()
    saved = get_optimizer_state_dict(models[0], optimizers[0])
    assert saved["state"].keys() == {name for name, _ in models[0].named_parameters() if not name.startswith("layers.3.")}
    save(tmp_path / "missing", models[0], optimizers[0])
    load(tmp_path / "missing", models[1], optimizers[1])
    for model, optimizer in zip(models, optimizers, strict=True):
        for step in (3, 4):
            some = [*gradients(step, AWKWARD, rank=dist.get_rank(), world_size=2)]
            some[4] = some[5] = None
            loss_of(model, some).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.layers[3].requires_grad_(True)
        train(model, optimizer, 5, 5, AWKWARD)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(get_optimizer_state_dict(models[0], optimizers[0])["state"]) == len(list(models[0].parameters()))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_frozen_later_has_state_that_is_saved_and_continued(tmp_path: Path, dtype: torch.dtype) -> None:
    """In whole state dicts too; it is loaded also where it is frozen by then."""
    models = [Model(AWKWARD).to(dtype) for _ in range(3)]
    optimizers = [sharded(STABLE, model, bucket_mb=SMALL) for model in models]
    train(models[0], optimizers[0], 1, 2, AWKWARD)
    train(models[2], optimizers[2], 4, 4, AWKWARD)  # so that it has other state
    models[0].layers[3].requires_grad_(False)
    models[2].layers[3].requires_grad_(False)
    train_trainable(models[0], optimizers[0], 3)
    names = {name for name, _ in models[0].named_parameters()}
    whole = get_optimizer_state_dict(models[0], optimizers[0], options=FULL)
    assert whole["state"].keys() == names
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, set(get_optimizer_state_dict(models[0], optimizers[0])["state"]))
    assert set.union(*of_ranks) == names
    folder = tmp_path / "frozen"
    save(folder, models[0], optimizers[0])
    for model, optimizer in zip(models[1:], optimizers[1:], strict=True):
        load(folder, model, optimizer)
    models[1].layers[3].requires_grad_(False)
    for model, optimizer in zip(models, optimizers, strict=True):
        train_trainable(model, optimizer, 4)
        model.layers[3].requires_grad_(True)
        train(model, optimizer, 5, 6, AWKWARD)
    for model in models[1:]:
        for a, b in zip(models[0].parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b)


def train_trainable(model: nn.Module, optimizer: so.ShardedOptimizer, step: int) -> None:
    grads = gradients(step, AWKWARD, rank=dist.get_rank(), world_size=dist.get_world_size())
    loss_of(model, [grad if param.requires_grad else None for param, grad in zip(model.parameters(), grads, strict=True)]).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.wait()


@pytest.mark.ranks(2)
def test_a_checkpoint_without_masters_says_so_and_a_partial_load_takes_the_parameters(tmp_path: Path) -> None:
    """By a planner that allows it."""
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "kahan_sum": False}
    model = Model(AWKWARD).bfloat16()
    optimizer = so.StableAdamW(model.parameters(), **options)
    assign(model, optimizer, 1, SAVED, AWKWARD)
    save(tmp_path / "no-masters", model, optimizer)
    resumed = another(AWKWARD).bfloat16()
    fresh = so.ShardedOptimizer(resumed, so.StableAdamW, **options)
    with pytest.raises(dcp.api.CheckpointException, match=r"Missing key in checkpoint state_dict: optimizer\.state\..*\.master"):
        load(tmp_path / "no-masters", resumed, fresh)
    load(tmp_path / "no-masters", resumed, fresh, planner=DefaultLoadPlanner(allow_partial_load=True))
    train(resumed, fresh, 4, 4, AWKWARD)
    other = Model(AWKWARD)
    other.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    expected = so.StableAdamW(other.parameters(), **options)
    expected.load_state_dict(optimizer.state_dict())
    assign(other, expected, 4, 4, AWKWARD)
    assert_like(resumed, fresh, other, expected, "no masters")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("options", [None, FLAT, StateDictOptions(cpu_offload=True)], ids=["nested", "flat", "offloaded"])
def test_state_is_copied_from_optimizer_to_optimizer(options: StateDictOptions | None) -> None:
    """With masters, without a checkpoint."""
    model, resumed = Model(ODD).bfloat16(), another().bfloat16()
    optimizer, fresh = (sharded(STABLE, each, bucket_mb=SMALL) for each in (model, resumed))
    train(model, optimizer, 1, SAVED)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    resumed.load_state_dict(model.state_dict())
    train(model, optimizer, SAVED + 1, SAVED + 1)
    set_optimizer_state_dict(resumed, fresh, saved, options=options)
    train(resumed, fresh, SAVED + 1, LAST)
    assert_like(resumed, fresh, *reference(STABLE), f"copied {options}")


@pytest.mark.ranks(2)
def test_parts_of_another_sharding_are_refused() -> None:
    model = Model(AWKWARD)
    optimizer = sharded(STABLE, model, bucket_mb=SMALL)
    train(model, optimizer, 1, 1, AWKWARD)
    saved = get_optimizer_state_dict(model, optimizer)
    other = sharded(STABLE, another(AWKWARD), bucket_mb=25.0)
    with pytest.raises(ValueError, match=r"was made for another sharding: of '.*' it has LogicalTensor.*ask get_optimizer_state_dict"):
        other.load_state_dict(saved)


# ------------------------------------------------------------------------------------------------------- on any number of ranks


def resume(
    path: Path,
    make: partial,
    groups: Callable[..., Any],
    mesh: Any = None,
    options: StateDictOptions | None = None,
    shapes: Any = ODD,
    dtype: torch.dtype = torch.float32,
    again: Path | None = None,  # where the new ranks save it in turn, after a step, for ranks in no mesh
) -> None:
    model = another(shapes).to(dtype)
    optimizer = sharded(make, model if groups is one_group else groups(model), mesh, bucket_mb=SMALL)
    loss_of(model, gradients(SAVED + 1, shapes, rank=dist.get_rank(), world_size=dist.get_world_size())).backward()
    load(path, model, optimizer, options)  # between a backward pass and its step
    optimizer.step()
    optimizer.zero_grad()
    if again is not None:
        save(again, model, optimizer, options)
        model = another(shapes).to(dtype)
        optimizer = sharded(make, model if groups is one_group else groups(model), bucket_mb=SMALL)
        load(again, model, optimizer, options)
    train(model, optimizer, SAVED + 2, LAST, shapes)
    assert_like(model, optimizer, *reference(make, groups, shapes), f"{path.name} {mesh}")


def check_full_file(path: Path, make: partial, groups: Callable[..., Any], mesh: Any) -> None:
    """A full state dict's file, without torch.distributed.checkpoint."""
    saved = torch.load(path)
    model = another()
    optimizer = sharded(make, model if groups is one_group else groups(model), mesh, bucket_mb=SMALL)
    model.load_state_dict(saved["model"])
    set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=FULL)
    train(model, optimizer, SAVED + 1, LAST)
    assert_like(model, optimizer, *reference(make, groups), f"{path.name}")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What 2 ranks have saved."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    ranks.run(check_saving, 2, folder)
    return folder


on_any_number = pytest.mark.parametrize("world_size", [1, 2, 3, 4])
whole_models = pytest.mark.parametrize(("name", "make", "groups"), [("stable", STABLE, one_group), ("amsgrad", AMSGRAD, two_groups)])


def replicas() -> Any:
    """On 4 ranks, replicas of shards."""
    return init_device_mesh("cpu", (2, 2)) if dist.get_world_size() == 4 else None


@pytest.mark.ranks
@on_any_number
@whole_models
def test_nested_checkpoints_of_2_ranks_continue_bitwise_on_any_number(
    saved: str, world_size: int, name: str, make: partial, groups: Callable[..., Any]
) -> None:
    """And what these ranks save in turn."""
    resume(Path(saved) / name, make, groups, replicas(), again=Path(saved) / f"{name}-by-{world_size}")


@pytest.mark.ranks
@on_any_number
@whole_models
def test_flattened_checkpoints_of_2_ranks_continue_bitwise_on_any_number(
    saved: str, world_size: int, name: str, make: partial, groups: Callable[..., Any]
) -> None:
    resume(Path(saved) / f"{name}-flat", make, groups, replicas(), FLAT)


@pytest.mark.ranks
@on_any_number
@whole_models
def test_full_state_dicts_of_2_ranks_continue_bitwise_on_any_number(
    saved: str, world_size: int, name: str, make: partial, groups: Callable[..., Any]
) -> None:
    check_full_file(Path(saved) / f"{name}.pt", make, groups, replicas())


@pytest.mark.ranks
@on_any_number
@pytest.mark.parametrize(
    ("name", "make", "shapes", "dtype"),
    [
        ("tiny", STABLE, TINY, torch.float32),
        ("masters", STABLE, ODD, torch.bfloat16),
        ("kahan", KAHAN, ODD, torch.bfloat16),
        ("kahan-fsdp2", KAHAN, AWKWARD, torch.bfloat16),
        ("fsdp2", STABLE, AWKWARD, torch.float32),
        ("ddp", STABLE, AWKWARD, torch.float32),
    ],
)
def test_checkpoints_of_tiny_and_low_precision_models_and_of_wrappers_continue_bitwise_on_any_number(
    saved: str, world_size: int, name: str, make: partial, shapes: Any, dtype: torch.dtype
) -> None:
    """Of ShardedOptimizer, and of ordinary optimizers under FSDP2 and DDP."""
    resume(Path(saved) / name, make, one_group, replicas(), shapes=shapes, dtype=dtype)


@pytest.mark.ranks
@on_any_number
@pytest.mark.parametrize("wrap", [DistributedDataParallel, fsdp2])
def test_checkpoints_of_2_ranks_continue_bitwise_under_ddp_and_fsdp2(saved: str, world_size: int, wrap: Callable[..., Any]) -> None:
    model = wrap(another(AWKWARD))
    optimizer = STABLE(model.parameters())
    load(Path(saved) / "zero", model, optimizer)
    forward(model, optimizer, SAVED + 1, LAST, AWKWARD)
    other, expected = reference(STABLE, shapes=AWKWARD)
    values = get_model_state_dict(model, options=FULL)
    states = get_optimizer_state_dict(model, optimizer, options=FULL)["state"]
    for name, param in other.named_parameters():
        assert torch.equal(values[name], param), name
        for key, value in expected.state[param].items():
            assert torch.equal(states[name][key], value), f"{name} {key}"


def test_tools_for_checkpoints_read_whole_tensors(saved: str) -> None:
    dcp_to_torch_save(f"{saved}/stable", f"{saved}/converted.pt")
    converted = torch.load(f"{saved}/converted.pt")
    model, optimizer = reference(STABLE, last=SAVED)
    for name, param in model.named_parameters():
        assert torch.equal(converted["model"][name], param)
        for key, value in optimizer.state[param].items():
            if param.numel():
                assert torch.equal(converted["optimizer"]["state"][name][key], value), (name, key)


def test_without_process_groups_state_dicts_are_those_of_an_ordinary_optimizer() -> None:
    model, other = Model(AWKWARD), Model(AWKWARD)
    optimizer, ordinary = sharded(STABLE, model), STABLE(other.parameters())
    for each, stepping in ((model, optimizer), (other, ordinary)):
        assign(each, stepping, 1, SAVED, AWKWARD)
    found, expected = get_optimizer_state_dict(model, optimizer), get_optimizer_state_dict(other, ordinary)
    assert found["param_groups"] == expected["param_groups"]
    for name, values in expected["state"].items():
        for key, value in values.items():
            assert torch.equal(found["state"][name][key], value)
    fresh = sharded(STABLE, other)
    assert {float(state["step"]) for state in get_optimizer_state_dict(other, fresh)["state"].values()} == {0.0}
    set_optimizer_state_dict(other, fresh, expected)
    for each, stepping in ((model, optimizer), (other, fresh)):
        assign(each, stepping, SAVED + 1, LAST, AWKWARD)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
