"""ShardedOptimizer: the bits of one process that is given the same gradients, whatever the ranks, stages, meshes and buckets."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import ref

import pytest
import torch
import torch.distributed as dist
from collectives import ranks_per_machine
from deepspeed_models import AWKWARD
from test_invariance import OPTIMIZERS
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import sharded_optim as so
from benchmarks.given_gradients import Model, gradients, one_group, two_groups

pytestmark = pytest.mark.filterwarnings("ignore:weight_decay")

STEPS = 4
SMALL = 0.002  # MiB of a bucket: several of them
STABLE = partial(so.StableAdamW, lr=1e-2, weight_decay=0.1)
Grads = Sequence[Tensor | None]  # of a model's parameters


def one_process(make: Callable[..., Any], steps: Sequence[Grads], groups: Callable[..., Any] = one_group, dtype=torch.float32) -> Any:
    """A model after steps with given gradients, and its optimizer."""
    model = Model(AWKWARD).to(dtype)
    optimizer = make(groups(model))
    for grads in steps:
        for param, grad in zip(model.parameters(), grads, strict=True):
            param.grad = None if grad is None else grad.to(dtype)
        optimizer.step()
    return model, optimizer


def contributions(step: int) -> list[Tensor]:
    """What this rank brings; the mean over ranks is `gradients(step, AWKWARD)`, exactly."""
    return gradients(step, AWKWARD, rank=dist.get_rank(), world_size=dist.get_world_size())


def mean_of(step: int, used: Callable[[int, int], bool]) -> list[Tensor | None]:
    """The mean of what the ranks contribute, where rank r contributes to parameter i if `used(r, i)`; None where none does."""
    world_size = dist.get_world_size()
    of_ranks = [gradients(step, AWKWARD, rank=rank, world_size=world_size) for rank in range(world_size)]
    found: list[Tensor | None] = []
    for index, parts in enumerate(zip(*of_ranks, strict=True)):
        bringing = [part for rank, part in enumerate(parts) if used(rank, index)]
        found.append(torch.stack(bringing).sum(0) / world_size if bringing else None)
    return found


def loss_of(model: nn.Module, grads: Grads) -> Tensor:
    """What has these gradients."""
    terms = [(param * grad.to(param.dtype)).sum() for param, grad in zip(model.parameters(), grads, strict=True) if grad is not None]
    return torch.stack(terms).sum()


def sharded(make: partial, params: Any, process_group: Any = None, *, overlap: bool = False, **options: Any) -> so.ShardedOptimizer:
    """Without overlap, as most tests use parameters without the forward of their model."""
    return so.ShardedOptimizer(params, make.func, process_group, overlap=overlap, **options, **make.keywords)


def assert_like(model: nn.Module, optimizer: so.ShardedOptimizer, expected: nn.Module, reference: Any, where: str) -> None:
    """Every parameter, and this rank's part of every state, bit for bit; and that all ranks together have all of it."""
    optimizer.wait()
    numbers = {param: number for number, param in enumerate(param for group in optimizer.param_groups for param in group["params"])}
    shards = optimizer.state_dict()["shards"]
    held = torch.zeros(len(shards), dtype=torch.int64)
    stepped = torch.zeros(len(shards), dtype=torch.int64)
    for (name, param), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(param, other.to(param.dtype)), f"{where} {name}"
        own = optimizer.state.get(param, {})
        shard = shards[numbers[param]]
        held[numbers[param]] = shard["numel"] if own else 0
        stepped[numbers[param]] = param.numel() * optimizer._topology.replicas if other in reference.state else 0
        for key, value in own.items():
            whole = other if key == "master" else reference.state[other][key]
            part = whole if key == "step" else whole.flatten()[shard["start"] : shard["start"] + shard["numel"]]
            assert value.dtype == part.dtype, f"{where} {name} {key}"
            assert torch.equal(value, part), f"{where} {name} {key}"
    dist.all_reduce(held)
    assert torch.equal(held, stepped), where


# -------------------------------------------------------------------------------------------------------------------- same bits

BITS = ("Adam-l2", "AdamW", "AdamW-skip-loop", "DecoupledAdamW-amsgrad", "DecoupledSGDW", "DecoupledSGDW-nesterov", "StableAdamW")
LOW = ("AdamW", "StableAdamW-corrected", "AdamW-kahan-stochastic", "StableAdamW-stochastic")  # with bfloat16 parameters


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("label", BITS)
def test_every_optimizer_has_the_bits_of_one_process_at_any_number_of_ranks(world_size: int, label: str) -> None:
    """Stages 1 and 2, one and two param groups, one bucket and several, one to all ranks on a machine; on 4 ranks shards in replicas."""
    meshes: list[Any] = [None, init_device_mesh("cpu", (2, 2))] if world_size == 4 else [None]
    steps = range(1, STEPS + 1)
    make = OPTIMIZERS[label]
    expected = {groups: one_process(make, [gradients(step, AWKWARD) for step in steps], groups) for groups in (one_group, two_groups)}
    for mesh in meshes:
        cases = [(1, two_groups, SMALL, 2), (2, two_groups, SMALL, 1 if mesh is None else world_size)]
        cases += [(2, one_group, None, world_size)] if world_size < 4 else []
        for stage, groups, bucket_mb, together in cases:
            model = Model(AWKWARD)
            if dist.get_rank():  # whose values are given to all
                nn.init.zeros_(model.layers[0].weight)
            given = model if groups is one_group else groups(model)
            with ranks_per_machine(together):
                optimizer = sharded(make, given, mesh, stage=stage, bucket_mb=bucket_mb, module=model, overlap=True)
            for step in steps:
                model(contributions(step)).backward()
                optimizer.step()
                optimizer.zero_grad()
            assert_like(model, optimizer, *expected[groups], f"{label} {stage=} {mesh} {bucket_mb} {together=}")


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("label", LOW)
def test_bfloat16_models_have_the_bits_of_one_process_at_any_number_of_ranks(world_size: int, label: str) -> None:
    """Float32 masters have the bits of a float32 model; with Kahan sums or stochastic rounding there are none."""
    mesh = init_device_mesh("cpu", (2, 2)) if world_size == 4 else None
    steps = range(1, STEPS + 1)
    make = OPTIMIZERS[label]
    has_masters = not {"kahan_sum", "stochastic_rounding"} & make.keywords.keys()
    dtype = torch.float32 if has_masters else torch.bfloat16
    expected = one_process(make, [gradients(step, AWKWARD) for step in steps], two_groups, dtype)
    for reduce_dtype in (None, torch.float32):
        model = Model(AWKWARD).bfloat16()
        optimizer = sharded(make, two_groups(model), mesh, bucket_mb=SMALL, reduce_dtype=reduce_dtype)
        for step in steps:
            loss_of(model, contributions(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(("master" in state) == has_masters for state in optimizer.state.values())
        assert_like(model, optimizer, *expected, f"{label} bf16 {reduce_dtype}")


# -------------------------------------------------------------------------------------------------------- what gradients there are


@pytest.mark.ranks(2)
def test_a_gradient_that_only_some_ranks_have_is_averaged_with_zeros() -> None:
    """A parameter that has a gradient on some ranks is averaged with zeros, one that has it on none is not stepped."""
    patterns: list[Callable[[int, int], bool]] = [
        lambda rank, index: True,
        lambda rank, index: index % 3 != rank,
        lambda rank, index: index not in (2, 5),
        lambda rank, index: rank == 1,
        lambda rank, index: False,
        lambda rank, index: True,
    ]
    for make in (STABLE, partial(so.AdamW, lr=1e-2, weight_decay=0.1)):
        steps = [mean_of(step, used) for step, used in enumerate(patterns, start=1)]
        expected = one_process(make, steps)
        model = Model(AWKWARD)
        optimizer = sharded(make, model, bucket_mb=SMALL)
        for step, used in enumerate(patterns, start=1):
            grads = [grad if used(dist.get_rank(), index) else None for index, grad in enumerate(contributions(step))]
            if any(grad is not None for grad in grads):  # else this rank calls no backward at all
                loss_of(model, grads).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_like(model, optimizer, *expected, f"unused {make.func.__name__}")


@pytest.mark.ranks(2)
def test_model_zero_grad_does_not_reach_the_buckets() -> None:
    """A step uses gradients up: `model.zero_grad()` does not reach the buckets."""
    expected = one_process(STABLE, [gradients(step, AWKWARD) for step in (1, 2, 3)])
    model = Model(AWKWARD)
    optimizer = sharded(STABLE, model)
    for step in (1, 2, 3):
        model(contributions(step)).backward()
        optimizer.step()
        model.zero_grad()
    assert_like(model, optimizer, *expected, "model.zero_grad")


@pytest.mark.ranks(2)
def test_gradients_of_micro_batches_add_up() -> None:
    """Micro-batches add up: reduced each, or under no_sync together with the last, also where that lacks a gradient."""
    expected = one_process(STABLE, [[a + b for a, b in zip(gradients(1, AWKWARD), gradients(2, AWKWARD), strict=True)]] * 2)
    for stage in (1, 2):
        for way in ("every", "last", "none"):
            model = Model(AWKWARD)
            optimizer = sharded(STABLE, model, stage=stage, bucket_mb=SMALL)
            for _ in range(2):
                first, second = contributions(1), contributions(2)
                if way == "every":
                    loss_of(model, first).backward()
                else:  # the third parameter has a gradient in the first pass alone
                    first[2] = first[2] + second[2]
                    with optimizer.no_sync():
                        loss_of(model, first).backward()
                        second[2] = None
                        if way == "none":
                            loss_of(model, second).backward()
                if way != "none":
                    loss_of(model, second).backward()
                optimizer.step()
                optimizer.zero_grad()
            assert_like(model, optimizer, *expected, f"accumulation {stage=} {way}")


@pytest.mark.ranks(2)
def test_an_assigned_gradient_is_not_averaged_again() -> None:
    """A gradient that was assigned is the average; it is not averaged again."""
    expected = one_process(STABLE, [gradients(step, AWKWARD) for step in (1, 2)])
    model = Model(AWKWARD)
    optimizer = sharded(STABLE, model)
    for step in (1, 2):
        for param, grad in zip(model.parameters(), gradients(step, AWKWARD), strict=True):
            param.grad = grad
        optimizer.step()
        optimizer.zero_grad()
        assert all(param.grad is None for param in model.parameters())
    assert_like(model, optimizer, *expected, "assigned")


@pytest.mark.ranks(2)
def test_groups_may_be_added_and_parameters_frozen_and_thawed() -> None:
    """Param groups that come later, parameters that are frozen and thawed, for a while or from the start."""
    for make in (STABLE, partial(so.AdamW, lr=1e-2)):
        reference = Model(AWKWARD)
        model = Model(AWKWARD)
        params, others = list(model.parameters()), list(reference.parameters())
        params[1].requires_grad_(False)
        expected = make([{"params": others[:5]}])
        optimizer = sharded(make, [{"params": params[:5]}], bucket_mb=SMALL)
        for step in range(1, 7):
            if step == 2:
                expected.add_param_group({"params": others[5:], "lr": 5e-3})
                optimizer.add_param_group({"params": params[5:], "lr": 5e-3})
            if step == 3:
                params[1].requires_grad_(True)
            params[0].requires_grad_(step != 4)
            whole, own = gradients(step, AWKWARD), contributions(step)
            absent = {1} if step < 3 else {0} if step == 4 else set()
            loss_of(model, [None if index in absent else grad for index, grad in enumerate(own)]).backward()
            for index, (other, grad) in enumerate(zip(others, whole, strict=True)):
                other.grad = None if index in absent else grad
            if step == 1:
                for param in params[5:]:
                    param.grad = None
            expected.step()
            optimizer.step()
            optimizer.zero_grad()
        params[0].requires_grad_(True)
        assert_like(model, optimizer, reference, expected, f"added and frozen {make.func.__name__}")


@pytest.mark.ranks(2)
def test_empty_groups_are_kept() -> None:
    """They are kept wherever they stand, with and without names, and a checkpoint has them."""
    for is_named in (False, True):
        reference, model = Model(AWKWARD), Model(AWKWARD)
        given, others = (list(each.named_parameters() if is_named else each.parameters()) for each in (model, reference))
        empty = {"params": [], "lr": 5e-3}
        expected = STABLE([{"params": others[:5]}, {"params": others[5:]}])
        optimizer = sharded(STABLE, [dict(empty), {"params": given[:5]}, dict(empty)], bucket_mb=SMALL)
        optimizer.add_param_group(dict(empty))
        optimizer.add_param_group({"params": given[5:]})
        for step in range(1, 4):
            loss_of(model, contributions(step)).backward()
            for param, grad in zip(reference.parameters(), gradients(step, AWKWARD), strict=True):
                param.grad = grad
            expected.step()
            optimizer.step()
            optimizer.zero_grad()
            if step == 2:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert [len(group["params"]) for group in optimizer.param_groups] == [0, 5, 0, 0, len(given) - 5]
        assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 1e-2, 5e-3, 5e-3, 1e-2]
        assert_like(model, optimizer, reference, expected, f"empty groups {is_named=}")


@pytest.mark.ranks(2)
def test_thawed_parameters_have_masters_by_the_options_of_their_group() -> None:
    """Parameters that are thawed have masters, or none, by the options that their group was given, as those that were never frozen."""
    for options, has_masters in (({}, True), ({"kahan_sum": True}, False)):
        model = Model(AWKWARD).bfloat16()
        params = list(model.parameters())
        params[2].requires_grad_(False)
        optimizer = sharded(partial(so.AdamW, lr=1e-2, **options), model)
        for _ in range(2):
            for param, grad in zip(params, gradients(1, AWKWARD), strict=True):
                param.grad = grad.bfloat16()
            optimizer.step()
            params[2].requires_grad_(True)
        assert all(("master" in state) == has_masters for state in optimizer.state.values())
        assert optimizer._bucket_layout.slots[params[2]].kind.has_masters == has_masters


class Odd(nn.Module):
    """Tied, non-contiguous and empty parameters, a scalar, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.turned = nn.Parameter(torch.randn(6, 9, generator=generator).t())
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.empty(0))
        self.register_buffer("count", torch.arange(3.0))
        nn.init.normal_(self.embedding.weight, generator=generator)


@pytest.mark.ranks(2)
def test_tied_transposed_empty_and_scalar_parameters_have_the_bits_of_one_process() -> None:
    reference, model = Odd(), Odd()
    expected = STABLE(reference.named_parameters())
    count = torch.arange(3.0) + dist.get_rank()
    model.count.copy_(count)
    optimizer = sharded(STABLE, model)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        grads = {name: torch.randint(-8, 9, param.shape, generator=generator) / 4.0 for name, param in reference.named_parameters()}
        for name, param in reference.named_parameters():
            param.grad = grads[name]
        expected.step()
        torch.stack([(param * grads[name]).sum() for name, param in model.named_parameters()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.wait()
    for (name, param), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(param, other), name
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.count, count), "buffers are left alone"


@pytest.mark.ranks(2)
def test_a_non_finite_gradient_on_one_rank_skips_the_step_on_all() -> None:
    """One element that is not finite on one rank, and no rank steps; the next step is as if nothing had been."""
    for bad_rank in (0, 1):
        expected = one_process(STABLE, [gradients(step, AWKWARD) for step in (1, 3)])
        model = Model(AWKWARD)
        optimizer = sharded(STABLE, model, bucket_mb=SMALL)
        for step in (1, 2, 3):
            grads = contributions(step)
            if step == 2 and dist.get_rank() == bad_rank:
                grads[4][4, 5] = torch.inf
            model(grads).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.skipped_steps == 1
        assert_like(model, optimizer, *expected, "non-finite")


@pytest.mark.ranks(2)
def test_activation_checkpointing_makes_one_round_of_reductions() -> None:
    """Backward passes inside of backward passes are one round of reductions, also where a parameter is used in several."""
    outcomes = []
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(dist.get_rank()))
    for way in ("none", "reentrant", "not reentrant"):
        torch.manual_seed(0)
        shared = nn.Linear(6, 6)
        blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)] + [shared, nn.Linear(6, 6), shared]
        model = nn.ModuleList([*blocks[:-1], nn.Linear(2, 2)])  # of which the last is not used
        optimizer = sharded(STABLE, model, bucket_mb=1e-4)
        for _ in range(3):
            y = x.clone().requires_grad_()
            for block in blocks:
                y = block(y) if way == "none" else checkpoint(block, y, use_reentrant=way == "reentrant")
            (y**2).mean().backward()
            optimizer.finish_reduction()
            rounds = optimizer._reducer.rounds
            optimizer.step()
            optimizer.zero_grad()
        assert rounds == 1, way
        optimizer.wait()
        outcomes.append([param.detach() for param in model.parameters()])
    for values in zip(*outcomes, strict=True):
        torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-7)
        assert torch.equal(values[2], values[0])


# ------------------------------------------------------------------------------------------------------------- around other things


@pytest.mark.ranks(2)
def test_gradients_that_ddp_has_averaged_are_stepped_as_they_are() -> None:
    """DistributedDataParallel, before or after, given or found: its averages are what is stepped, with one reduction."""
    steps = range(1, 4)
    expected = one_process(STABLE, [gradients(step, AWKWARD) for step in steps])
    for way in ("model", "parameters", "before"):
        model = Model(AWKWARD)
        early = sharded(STABLE, model, overlap=True) if way == "before" else None
        wrapped = DistributedDataParallel(model)
        optimizer = early or sharded(STABLE, wrapped if way == "model" else wrapped.parameters(), bucket_mb=SMALL, overlap=True)
        for step in steps:
            wrapped(contributions(step)).backward()
            assert not any(bucket.gathering.arriving for bucket in optimizer._bucket_layout.buckets), "forward has not waited"
            assert all(param.grad is not None for param in model.parameters()), way
            optimizer.step()
            optimizer.zero_grad()
        assert_like(model, optimizer, *expected, f"DDP {way}")


@pytest.mark.ranks(2)
def test_ddp_around_a_part_of_the_parameters_is_refused() -> None:
    model = Model(AWKWARD)
    kept = DistributedDataParallel(model.layers[0]), sharded(STABLE, model)
    with pytest.raises(ValueError, match=r"averages the gradients of some parameters, but not that of 'layers.1.weight'"):
        loss_of(model, contributions(1)).backward()
    dist.barrier()
    del kept


@pytest.mark.ranks(2)
def test_grad_scaler_scales_the_gradients_that_ddp_leaves() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model = Model(AWKWARD)
    wrapped = DistributedDataParallel(model)
    optimizer = sharded(partial(so.AdamW, lr=1e-2), wrapped)
    before = [param.detach().clone() for param in model.parameters()]
    scaler.scale(wrapped(contributions(1))).backward()
    scaler.step(optimizer)
    optimizer.wait()
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.ranks(2)
def test_grad_scaler_is_refused_where_gradients_are_in_buckets() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model = Model(AWKWARD)
    optimizer = sharded(STABLE, model)
    scaler.scale(model(contributions(1))).backward()
    with pytest.raises(ValueError, match=r"GradScaler finds no gradients in the parameters.*DistributedDataParallel"):
        scaler.step(optimizer)
    dist.barrier()  # the other rank may still be in backward, for which it needs this rank's optimizer


@pytest.mark.ranks(2)
def test_clip_grad_norm_gives_the_norm_of_whole_gradients() -> None:
    """clip_grad_norm_ gives the norm of whole gradients, and the step of gradients that are scaled by it."""
    for norm_type in (2.0, 1.0, float("inf")):
        reference = Model(AWKWARD)
        expected = STABLE(reference.parameters())
        for param, grad in zip(reference.parameters(), gradients(3, AWKWARD), strict=True):
            param.grad = grad
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5, norm_type)
        expected.step()
        for way in ("buckets", "DDP"):
            model = Model(AWKWARD)
            wrapped = DistributedDataParallel(model) if way == "DDP" else model
            optimizer = sharded(STABLE, wrapped, bucket_mb=SMALL)
            wrapped(contributions(3)).backward()
            found = optimizer.clip_grad_norm_(0.5, norm_type)
            torch.testing.assert_close(found, norm)
            optimizer.step()
            optimizer.wait()
            for param, other in zip(model.parameters(), reference.parameters(), strict=True):
                torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-7)


@pytest.mark.ranks(2)
def test_operations_on_a_gradient_that_is_in_a_bucket_are_refused() -> None:
    """While gradients are in buckets, whoever computes with param.grad gets an error by name; steps have the bits of who does not."""
    expected = one_process(STABLE, [[a + b for a, b in zip(gradients(1, AWKWARD), gradients(2, AWKWARD), strict=True)]] * 2)
    model = Model(AWKWARD)
    params = list(model.parameters())
    optimizer = sharded(STABLE, model, bucket_mb=SMALL)
    refused = {
        "clip_grad_norm_": lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
        "clip_grad_norm_ by foreach": lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3, foreach=True),
        "clip_grad_value_": lambda: torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3),
        "zeroing": lambda: model.zero_grad(set_to_none=False),
        "reading": lambda: float(params[0].grad.norm()),
        "adding": lambda: params[0].grad.add_(torch.ones_like(params[0])),
        "copying": lambda: params[0].grad.clone(),
        "another optimizer": lambda: torch.optim.SGD(params, lr=1.0).step(),
    }
    for _ in range(2):
        model(contributions(1)).backward()
        for action in refused.values():
            with pytest.raises(
                ValueError, match=r"the gradient of 'layers.*' is in a bucket.*clip with optimizer.clip_grad_norm_\(max_norm\)"
            ):
                action()
        assert all(param.grad is not None and param.grad.shape == param.shape for param in params)
        assert "is in a bucket" in repr(params[0].grad)
        copy.deepcopy(model)
        with optimizer.no_sync():
            first, second = contributions(2), contributions(2)
            loss_of(model, [*first[:3], None, *[grad / 2 for grad in first[4:]]]).backward()
        loss_of(model, [None, None, None, second[3], *[grad / 2 for grad in second[4:]]]).backward()
        optimizer.step()
        assert all(param.grad is None for param in params), "a step uses gradients up"
    assert_like(model, optimizer, *expected, "placeholders")


@pytest.mark.ranks(2)
def test_placeholders_of_gradients_end_with_the_optimizer() -> None:
    """Also one that a hook of the user has met in vain."""
    model = Model(AWKWARD)
    params = list(model.parameters())
    optimizer = sharded(STABLE, model, bucket_mb=SMALL)
    model(contributions(1)).backward()
    hook = params[0].register_post_accumulate_grad_hook(lambda param: param.grad.add_(1.0))
    with pytest.raises(ValueError, match=r"the gradient of 'layers.0.weight' is in a bucket"):
        params[0].sum().backward()
    hook.remove()
    dist.barrier()  # the other rank may still be in backward, for which it needs this rank's optimizer
    del optimizer
    gc.collect()
    assert all(param.grad is None for param in params), "they go with the optimizer"


@pytest.mark.ranks(2)
def test_compiled_models_accumulate_gradients_in_buckets() -> None:
    """Models that torch.compile has traced, again while gradients are in buckets."""
    expected = one_process(STABLE, [[a + b for a, b in zip(gradients(1, AWKWARD), gradients(2, AWKWARD), strict=True)]])
    model = Model(AWKWARD)
    optimizer = sharded(STABLE, model, bucket_mb=SMALL)
    for step in (1, 2):
        torch.compile(partial(loss_of, model), backend="aot_eager")(contributions(step)).backward()
        torch.compiler.reset()
    optimizer.step()
    assert_like(model, optimizer, *expected, "compiled")


@pytest.mark.ranks(2)
def test_parameters_written_between_steps_count() -> None:
    """What users write to parameters between steps counts, also against masters; what they cannot do is refused."""
    for dtype in (torch.float32, torch.bfloat16):
        reference = Model(AWKWARD)
        expected = STABLE(reference.parameters())
        model = Model(AWKWARD).to(dtype)
        optimizer = sharded(STABLE, model)
        for step in (1, 2, 3):
            loss_of(model, contributions(step)).backward()
            for param, grad in zip(reference.parameters(), gradients(step, AWKWARD), strict=True):
                param.grad = grad
            expected.step()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.wait()
            values = {name: param.detach() * 0 + step for name, param in model.named_parameters()}
            if step == 1:
                model.load_state_dict(values)
            else:
                for name, param in model.named_parameters():
                    param.data = values[name]
            with torch.no_grad():
                for param in reference.parameters():
                    param.fill_(step)


@pytest.mark.ranks(2)
def test_a_model_that_has_become_float64_is_refused() -> None:
    model = Model(AWKWARD).bfloat16()
    optimizer = sharded(STABLE, model)
    loss_of(model, contributions(1)).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.wait()
    model.double()
    with pytest.raises(ValueError, match=r"parameter 'layers.0.weight' has become torch.float64.*convert the model before"):
        optimizer.step()


@pytest.mark.ranks(2)
def test_an_optimizer_whose_parameters_another_has_taken_over_is_refused() -> None:
    newer = sharded(STABLE, Model(AWKWARD).parameters())
    params = [param for group in newer.param_groups for param in group["params"]]
    newest = sharded(STABLE, params)
    with pytest.raises(ValueError, match=r"another ShardedOptimizer has taken over"):
        newer.step()
    del newest


@pytest.mark.ranks(2)
def test_metrics_are_those_of_one_process() -> None:
    """As those of one process: under the names of whole tensors, on every rank."""
    reference, expected = one_process(STABLE, [gradients(1, AWKWARD)], lambda model: list(model.named_parameters()))
    model = Model(AWKWARD)
    optimizer = sharded(STABLE, model, bucket_mb=SMALL)
    model(contributions(1)).backward()
    optimizer.step()
    optimizer.wait()
    assert optimizer.metrics() == expected.metrics()
    found: dict[str, Any] = {}
    wanted: dict[str, Any] = {}
    for (name, param), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        optimizer.report_per_parameter_metrics(param, name, found)
        expected.report_per_parameter_metrics(other, name, wanted)
    optimizer.dist_reduce_metrics(optimizer.pre_reduce_metrics(found))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, msg=key)


class Slow(nn.Module):
    """Uses what belongs to modules that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(8)) for _ in range(3))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block, scale in zip(self.blocks, self.scales, strict=True):
            x = block(x) * scale
        return x


@pytest.mark.ranks(2)
def test_forward_and_state_dict_see_whole_parameters_while_they_are_gathered() -> None:
    """A forward pass, in training and in evaluation, and a state dict see whole new parameters, though step returns before they are."""
    rank = dist.get_rank()
    models, optimizers = [], []
    for overlap in (True, False):
        model = Slow()
        models.append(model)
        optimizers.append(sharded(STABLE, model, bucket_mb=SMALL, overlap=overlap, transport="sends"))
    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(rank))
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            model.train()
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert any(bucket.gathering.arriving for bucket in optimizers[0]._bucket_layout.buckets), "nothing is left to overlap"
        assert not any(bucket.gathering.leaving for bucket in optimizers[1]._bucket_layout.buckets)
        if step == 1:
            for model in models:
                model.eval()
            with torch.no_grad():
                assert torch.equal(models[0](x), models[1](x))
        if step == 2:
            for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
                assert torch.equal(a, b)
    optimizers[0].wait()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def overlapping() -> tuple[nn.Module, so.ShardedOptimizer, Tensor]:
    """A model, its optimizer, of which steps return before parameters are gathered, and this rank's input."""
    model = Slow()
    optimizer = sharded(STABLE, model, bucket_mb=SMALL, overlap=True, transport="sends")
    return model, optimizer, torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(dist.get_rank()))


def begin_step(model: nn.Module, optimizer: so.ShardedOptimizer, x: Tensor) -> None:
    """A step that is not waited for."""
    model(x).square().mean().backward()
    optimizer.step()
    model.zero_grad()
    assert any(bucket.gathering.is_arriving for bucket in optimizer._bucket_layout.buckets)


def whole(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def assert_same_everywhere(model: nn.Module) -> None:
    mine = whole(model)
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(others, mine)
    assert all(torch.equal(each, mine) for each in others)


@pytest.mark.ranks(2)
def test_a_step_waits_for_whole_parameters_where_a_hook_would_read_them() -> None:
    """As an average of weights does."""
    model, optimizer, x = overlapping()
    optimizer.register_step_post_hook(lambda *_: None)
    model(x).square().mean().backward()
    optimizer.step()
    assert not any(bucket.gathering.leaving for bucket in optimizer._bucket_layout.buckets)


@pytest.mark.ranks(2)
def test_the_state_dict_of_one_rank_alone_has_whole_parameters() -> None:
    model, optimizer, x = overlapping()
    begin_step(model, optimizer, x)
    saved = torch.cat([value.flatten() for value in model.state_dict().values()]) if dist.get_rank() == 0 else None
    dist.barrier()
    optimizer.wait()
    assert saved is None or torch.equal(saved, whole(model))


@pytest.mark.ranks(2)
def test_a_part_of_the_model_that_is_called_alone_waits_for_its_parameters() -> None:
    model, optimizer, x = overlapping()
    begin_step(model, optimizer, x)
    model.blocks[1](model.first(x))
    assert not any(optimizer._bucket_layout.slots[param].bucket.gathering.is_arriving for param in model.blocks[1].parameters())
    optimizer.wait()


@pytest.mark.ranks(2)
def test_values_that_are_loaded_after_a_step_are_not_overwritten_by_it() -> None:
    model, optimizer, x = overlapping()
    begin_step(model, optimizer, x)
    model.load_state_dict({name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()})
    assert_same_everywhere(model)
    assert torch.equal(whole(model), torch.full_like(whole(model), 0.5))


@pytest.mark.ranks(2)
def test_a_copy_of_the_model_runs_while_parameters_are_gathered() -> None:
    model, optimizer, x = overlapping()
    copied = copy.deepcopy(model)
    begin_step(model, optimizer, x)
    copied(x)
    optimizer.wait()
    assert_same_everywhere(model)


@pytest.mark.ranks(2)
def test_a_newer_optimizer_waits_for_what_the_other_has_begun() -> None:
    model, optimizer, x = overlapping()
    begin_step(model, optimizer, x)
    newer = sharded(STABLE, model, bucket_mb=SMALL, overlap=True, transport="sends")
    assert_same_everywhere(model)
    begin_step(model, newer, x)
    del optimizer, newer  # what they have begun ends
    gc.collect()
    model(x)
    assert_same_everywhere(model)


@pytest.mark.ranks(2)
def test_a_parameter_that_is_used_before_it_is_gathered_is_an_error() -> None:
    model, optimizer, x = overlapping()
    begin_step(model, optimizer, x)
    with pytest.raises(
        RuntimeError, match=r"'first.weight' was used before its new values had arrived from the other ranks.*overlap=False"
    ):
        model.first.weight.sum().backward()
    dist.barrier()  # the other rank may still receive what this rank's optimizer sends


@pytest.mark.ranks(2)
def test_parameters_that_ranks_read_in_shared_memory_are_whole_when_a_step_returns() -> None:
    optimizer = sharded(STABLE, Model(AWKWARD), overlap=True)
    optimizer.zero_grad()
    assert not optimizer._overlaps


@pytest.mark.ranks(2)
def test_hooks_end_with_their_optimizer() -> None:
    """Hooks go with their optimizer, at once or when what it has begun has ended, and with them all but the parameters' own memory."""

    def hooks(model: nn.Module) -> int:
        own = [(each._forward_pre_hooks, each._state_dict_pre_hooks, each._load_state_dict_pre_hooks) for each in model.modules()]
        return sum(map(len, (each for three in own for each in three)))

    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    for together in (1, 2):
        for waits in (True, False):
            model, reference = Slow(), Slow()
            gone: list[Any] = []
            for _ in range(4):
                with ranks_per_machine(together):
                    optimizer = sharded(STABLE, model, bucket_mb=SMALL, overlap=True)
                other = sharded(STABLE, reference, bucket_mb=SMALL)
                assert hooks(model) == (hooks(copy.deepcopy(model)) if together == 1 else 0)
                model(x).square().mean().backward()
                reference(x).square().mean().backward()
                optimizer.step()
                other.step()
                if waits:
                    optimizer.wait()
                gone += [ref(optimizer._engine), ref(optimizer._reducer), *map(ref, optimizer._bucket_layout.buckets)]
                other.wait()
                gone_at_once = [ref(other), ref(other._engine), ref(other._reducer), *map(ref, other._bucket_layout.buckets)]
                gc.collect()
                gc.disable()
                del optimizer, other
                assert not any(each() for each in gone_at_once)
                gc.enable()
                gc.collect()
                assert (hooks(model) == 0) == (waits or together == 2)
                assert waits or together == 2 or hooks(model) > 0, "what was begun is not waited for"
            assert torch.equal(model(x), reference(x))
            gc.collect()
            assert hooks(model) == 0
            assert not any(each() for each in gone)
            model.blocks[0](x)


@pytest.mark.ranks(2)
def test_an_optimizer_given_parameters_alone_waits_for_its_predecessor() -> None:
    """A new optimizer that is not given the model waits for what one that is gone has begun."""
    model, reference = Slow(), Slow()
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    for each, overlap in ((model, True), (reference, False)):
        optimizer = sharded(STABLE, each, bucket_mb=SMALL, overlap=overlap, transport="sends")
        each(x).square().mean().backward()
        optimizer.step()
        del optimizer
        gc.collect()
        kept = sharded(STABLE, list(each.parameters()))
        del kept
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.ranks(2)
def test_parameters_that_a_conversion_swapped_are_refused() -> None:
    """No weak reference keeps torch from swapping tensors; gradients that then come to no bucket are not taken for averages."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for way in ("device", "dtype"):
            model = Model(AWKWARD)
            optimizer = sharded(STABLE, model)
            model(contributions(1)).backward()
            optimizer.step()
            model.to("cpu") if way == "device" else model.double()
            loss_of(model, contributions(2)).backward()
            with pytest.raises(ValueError, match=r"parameter 'layers.0.weight' was swapped.*convert the model before"):
                optimizer.step()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.ranks(2)
def test_hooks_keep_neither_the_optimizer_nor_the_model_alive() -> None:
    """Hooks do not keep an optimizer alive, and a model without its optimizer trains as any other."""
    model = Model(AWKWARD)
    optimizer = sharded(STABLE, model, overlap=True)
    model(contributions(1)).backward()
    optimizer.step()
    optimizer.wait()
    gone = ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    model(contributions(2)).backward()
    assert all(param.grad is not None for param in model.parameters())
    values = ref(model.layers[0].weight)
    del model
    gc.collect()
    assert values() is None, "the model is kept alive"
