"""What changes between two steps: process groups, param groups, parameters, what is behind a parameter, replicas, options."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import sharded_optim as so
from sharded_optim.optimizers.adam import ADAM
from sharded_optim.sharding import Layout, ddp
from sharded_optim.step import grouped

CLASSES = [so.Adam, so.AdamW, so.StableAdamW, so.DecoupledAdamW, so.DecoupledSGDW]
SHAPES = ((7, 3), (), (5,), (0,), (64, 8))


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_grads(params: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * scale


def named(params: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"w{index}", param) for index, param in enumerate(params)]


# -------------------------------------------------------------------------------------------------------------------- one process


def test_a_parameter_is_stepped_with_the_group_it_is_in_now() -> None:
    """Whether it is moved to a new list, within lists, or to a group that is added later; steps of it alone and of all alternate."""
    a, b, c = (nn.Parameter(torch.ones(4)) for _ in range(3))
    optimizer = so.AdamW([{"params": [a, c], "lr": 1.0}, {"params": [b], "lr": 1e-6}], lr=1e-3, weight_decay=0.0, eps=1e-8)

    def step_size(only: Tensor | None) -> float:
        before = a.detach().clone()
        for param in (a, b, c):
            param.grad = torch.ones(4)
        optimizer.step(param=only)
        return (before - a.detach())[0].item()

    assert step_size(a) == pytest.approx(1.0)
    optimizer.param_groups[0]["params"], optimizer.param_groups[1]["params"] = [c], [b, a]
    assert step_size(a) == pytest.approx(1e-6, rel=0.1)
    assert step_size(None) == pytest.approx(1e-6, rel=0.1)
    optimizer.param_groups[1]["params"].pop()
    optimizer.param_groups[0]["params"].insert(0, a)
    assert step_size(a) == pytest.approx(1.0)
    optimizer.param_groups.reverse()
    assert step_size(a) == pytest.approx(1.0)
    optimizer.param_groups[1]["params"].pop(0)
    optimizer.add_param_group({"params": [a], "lr": 0.5})
    assert step_size(a) == pytest.approx(0.5)
    optimizer.param_groups.pop()
    with pytest.raises(ValueError, match="none of the optimizer's param groups"):
        step_size(a)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_optimizer_is_freed_as_soon_as_nobody_uses_it(cls: type) -> None:
    """As one of torch, without the cycle collector; what it kept for each step goes with it."""
    params = parameters()
    optimizer = cls(named(params), lr=1e-2)
    give_grads(params, 0)
    optimizer.step()
    optimizer.step(param=params[0])
    optimizer.metrics()
    optimizer.report_per_parameter_metrics(params[0], "w0", {})
    optimizer.load_state_dict(optimizer.state_dict())
    give_grads(params, 1)
    optimizer.step()
    alive = [weakref.ref(optimizer), *(weakref.ref(value) for value in optimizer.state[params[0]].values())]
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert [each() for each in alive] == [None] * len(alive)
    finally:
        gc.enable()


def test_replaced_parameters_are_freed() -> None:
    """As by growing and pruning: neither the layout nor reports keep them once others were stepped."""
    params = parameters()
    optimizer = so.StableAdamW(named(params), lr=1e-2)
    give_grads(params, 0)
    optimizer.step()
    optimizer.step(param=params[0])
    old = weakref.ref(params[0])
    optimizer.state.pop(params[0])
    params[0] = optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(3, 3))
    give_grads(params, 1)
    optimizer.step()
    gc.collect()
    assert old() is None


def test_what_is_kept_of_sets_that_are_stepped_alone_is_bounded() -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(8)]
    optimizer = so.StableAdamW(named(params), lr=1e-2)
    for number in range(1, 2 ** len(params)):
        subset = [param for bit, param in enumerate(params) if number >> bit & 1]
        give_grads(subset, number)
        optimizer.step(param=subset)
    kept = [each for each in gc.get_objects() if type(each) is Layout and any(p is q for p in each.params for q in params)]
    assert len(kept) <= 8 * len(params) + 1
    assert len(list(optimizer._sets)) <= 8 * len(params) + 1
    assert optimizer.metrics()["rms/w7"] > 0


def test_objects_are_searched_for_models_as_often_as_sets_of_all_parameters_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not for each parameter that gradient release steps alone: a search takes as long as thousands of steps."""
    searches = []
    monkeypatch.setattr(ddp, "ddp_modules", lambda: searches.append(1) or [])
    monkeypatch.setattr(ddp.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(grouped, "own_process_group", lambda *_: None)
    params = parameters()
    optimizer = so.StableAdamW(named(params), lr=1e-2)
    for _ in range(2):
        give_grads(params, 0)
        for param in params:
            optimizer.step(param=param)
        optimizer.step()
    assert len(searches) <= 2


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("stepped", [False, True])
def test_a_1d_parameter_alone_in_its_group_may_be_replaced_by_one_of_another_size(cls: type, stepped: bool) -> None:
    """As in torch: users grow and prune parameters, and move state by hand."""
    old = nn.Parameter(torch.ones(6))
    optimizer = cls([{"params": [old], "name": "opacity"}], lr=1e-2)
    old.grad = torch.ones(6)
    if stepped:
        optimizer.step()
    state = optimizer.state.pop(old, None)
    new = nn.Parameter(old.detach()[:4].clone())
    optimizer.param_groups[0]["params"][0] = new
    if state is not None:
        optimizer.state[new] = {key: value[:4].clone() if value.ndim else value for key, value in state.items()}
    for _ in range(2):
        for param in (old, new):
            param.grad = torch.full(param.shape, 0.5)
        optimizer.step()
    assert optimizer.state[new]["step"] == 2 + stepped
    assert bool((new.detach() < old.detach()[:4]).all()) or not stepped


@pytest.mark.parametrize("cls", CLASSES)
def test_empty_state_begins_anew(cls: type) -> None:
    """As in torch, whose optimizers take it as none."""
    param = nn.Parameter(torch.ones(3))
    optimizer = cls([("w", param)], lr=1e-2)
    param.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[param] = {}
    optimizer.step()
    assert optimizer.state[param]["step"] == 1


def test_state_without_a_step_counter_is_refused_by_name() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = so.AdamW([("w", param)], lr=1e-2)
    param.grad = torch.ones(3)
    optimizer.step()
    del optimizer.state[param]["step"]
    with pytest.raises(ValueError, match="the state of 'w' lacks 'step'"):
        optimizer.step()


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "kahan_comp", "step"])
@pytest.mark.parametrize("cls", [so.AdamW, so.StableAdamW])
def test_state_on_another_device_than_its_parameter_is_refused(cls: type, key: str) -> None:
    """A kernel that is given its address would end the process."""
    param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = cls([("w", param)], lr=1e-2)
    param.grad = torch.ones(3, dtype=torch.bfloat16)
    optimizer.step()
    optimizer.state[param][key] = optimizer.state[param][key].to("meta")
    before = param.detach().clone()
    with pytest.raises(ValueError, match="on meta" if key == "step" else rf"state '{key}' of 'w' is on meta, the parameter on cpu; move"):
        optimizer.step()
    assert torch.equal(param.detach(), before)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_parameter_of_which_the_content_is_swapped_is_stepped_as_it_is_now(cls: type) -> None:
    """`nn.Module.to` swaps the content of parameters under the same objects, where it is told to."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = nn.Linear(5, 3)
        optimizer = cls(model.parameters(), lr=1e-2)
        model.to(torch.bfloat16)
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            model.to(dtype)
            start = model.weight.detach().clone()
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()
            assert model.weight.dtype == dtype
            assert bool((model.weight < start).all())
            model.zero_grad()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("option", ["kahan_sum", "amsgrad"])
def test_an_option_may_change_in_one_of_two_groups_that_were_stepped_together(option: str, index: int) -> None:
    params = [nn.Parameter(torch.ones(5, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = so.DecoupledAdamW([{"params": [param]} for param in params], lr=1e-2)
    for value in (None, {"kahan_sum": False, "amsgrad": True}[option]):
        if value is not None:
            optimizer.param_groups[index][option] = value
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    for number, param in enumerate(params):
        changed = {"kahan_sum": "kahan_comp" not in optimizer.state[param], "amsgrad": "max_exp_avg_sq" in optimizer.state[param]}
        assert changed[option] == (number == index)


def scale_gradients(optimizer: so.StableAdamW, param: Tensor) -> None:
    """As GradScaler does."""
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(64.0), torch.tensor(0.0)


CHANGES_AFTER_OBSERVATION: dict[str, Callable[[so.StableAdamW, Tensor], object]] = {
    "gradient written": lambda optimizer, param: param.grad.mul_(0.01),
    "gradient replaced": lambda optimizer, param: setattr(param, "grad", torch.full_like(param, 0.01)),
    "state written": lambda optimizer, param: optimizer.state[param]["exp_avg_sq"].mul_(9.0),
    "step counter": lambda optimizer, param: optimizer.state[param]["step"].add_(5.0),
    "betas": lambda optimizer, param: optimizer.param_groups[0].update(betas=(0.9, 0.5)),
    "gradients are scaled": scale_gradients,
}


def test_observing_a_unit_before_the_first_step_is_no_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks observe within backward, each the units that it holds: a process group that is made there would wait for the others."""
    params = parameters()
    optimizer = so.StableAdamW(named(params), lr=1e-2)
    monkeypatch.setattr(grouped.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(grouped, "own_process_group", lambda *_: pytest.fail("a process group was made"))
    give_grads(params, 0)
    optimizer.observe_unit(0)


@pytest.mark.parametrize("change", CHANGES_AFTER_OBSERVATION)
def test_what_was_observed_before_the_step_is_not_used_after_a_change(change: str) -> None:
    """The step has the bits of one before which nothing was observed."""
    ends = []
    for observes_before in (True, False):
        params = parameters()
        optimizer = so.StableAdamW(named(params), lr=1e-2)
        give_grads(params, 0)
        optimizer.step()
        give_grads(params, 1, scale=30.0)
        if observes_before:
            optimizer.observe_unit(0)
            assert any(call._early for each in optimizer._sets for call in each.calls)
        with torch.no_grad():
            CHANGES_AFTER_OBSERVATION[change](optimizer, params[0])
        optimizer.step()
        ends.append(params)
    assert all(map(torch.equal, *ends))


def test_options_are_checked_when_they_are_set() -> None:
    optimizer = so.AdamW([nn.Parameter(torch.ones(3))], lr=1e-2)
    for name, value in (("nonfinite", "ignore"), ("nonfinite", None), ("max_skipped_steps", 0), ("max_skipped_steps", True)):
        before = getattr(optimizer, name)
        with pytest.raises(ValueError, match=f"{name} must be"):
            setattr(optimizer, name, value)
        assert getattr(optimizer, name) == before


# ---------------------------------------------------------------------------------------------------------------------- two ranks


@pytest.mark.ranks(2)
def test_process_groups_may_come_and_go_between_steps(tmp_path: Path) -> None:
    """A step alone, two with the other rank, one alone: each as by an optimizer that knew no other process group.

    Ranks that were alone before compare their parameters.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def meet(number: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store{number}", rank=rank, world_size=world_size)

    params, twins = parameters(), parameters()
    optimizer = so.StableAdamW(named(params), lr=1e-2)

    def check(seed: int) -> None:
        fresh = so.StableAdamW(named(twins), lr=1e-2)
        fresh.load_state_dict(optimizer.state_dict())
        for each, stepping in ((params, optimizer), (twins, fresh)):
            give_grads(each, seed, scale=5.0 * seed)
            stepping.step()
        assert optimizer.metrics() == fresh.metrics()
        assert optimizer.metrics()["rms/w4"] > 0
        for param, twin in zip(params, twins, strict=True):
            assert torch.equal(param, twin)

    dist.destroy_process_group()
    check(1)
    meet(1)
    check(2)
    check(3)
    dist.barrier()
    dist.destroy_process_group()
    check(4)
    other_values = nn.Parameter(torch.full((3,), float(rank)))
    apart = so.StableAdamW([("apart", other_values)], lr=1e-2)
    other_values.grad = torch.zeros(3)
    apart.step()
    meet(2)
    with pytest.raises(ValueError, match=r"ranks 0 and 1 both hold 'apart' .* but with different values"):
        apart.step()
    check(5)
    other = dist.new_group([0, 1])
    optimizer.process_group = other
    check(6)


@pytest.mark.ranks(2)
def test_ranks_step_together_whatever_ids_python_gives_to_replaced_parameters() -> None:
    """A parameter is replaced again and again; each rank reuses other ids of those before."""
    param = parameters()[0]
    optimizer = so.StableAdamW([("w", param)], lr=1e-2)
    for generation in range(1, 40):
        param.grad = torch.ones(7, 3)
        optimizer.step()
        optimizer.state.clear()
        if dist.get_rank() == 1:
            kept = [object() for _ in range(generation * 7)], parameters(99)
            assert len(kept) == 2
        param = parameters(generation)[0]
        optimizer.param_groups[0]["params"] = [param]


@pytest.mark.ranks(2)
def test_replicas_of_a_param_group_that_is_added_later_are_compared() -> None:
    """Those known before are not: they may have drifted in their last bits."""
    first = nn.Parameter(torch.ones(16))
    optimizer = so.StableAdamW([("w", first)], lr=1e-2)
    first.grad = torch.ones(16)
    optimizer.step()
    with torch.no_grad():
        first[0] = torch.nextafter(first[0], torch.tensor(2.0 * dist.get_rank()))
    late = nn.Parameter(torch.full((8,), float(dist.get_rank())))
    optimizer.add_param_group({"params": [("late", late)]})
    late.grad = torch.ones(8)
    with pytest.raises(ValueError, match=r"ranks 0 and 1 both hold 'late' .* but with different values"):
        optimizer.step()
    with torch.no_grad():
        late.zero_()
    optimizer.step()


@pytest.mark.ranks(2)
def test_nonfinite_may_change_between_steps_on_ranks_with_different_numbers_of_tensors() -> None:
    """Each rank holds another number of tensors, as stages of a pipeline do."""
    rank = dist.get_rank()
    params = [nn.Parameter(torch.ones(4)) for _ in range(1 + rank)]
    optimizer = so.AdamW([(f"stage{rank}.w{index}", param) for index, param in enumerate(params)], lr=1e-2)

    def step(*, bad: bool) -> None:
        for param in params:
            param.grad = torch.full((4,), float("nan") if bad and rank == 0 else 1.0)
        optimizer.step()

    step(bad=False)
    before = [param.detach().clone() for param in params]
    optimizer.nonfinite = "skip"
    step(bad=True)
    assert optimizer.skipped_steps == 1
    assert all(map(torch.equal, before, params))
    optimizer.nonfinite = "raise"
    with pytest.raises(FloatingPointError, match=r"rank 0: gradient not finite.*'stage0.w0'"):
        step(bad=True)
    optimizer.nonfinite = "allow"
    step(bad=False)
    assert all(bool((a > b).all()) for a, b in zip(before, params, strict=True))


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("cls", "change"), [(so.StableAdamW, "add"), (so.AdamW, "add"), (so.StableAdamW, "replace"), (so.StableAdamW, "remove")]
)
def test_parameters_that_change_on_one_rank_alone_are_refused_on_all(cls: type, change: str) -> None:
    """All ranks raise, and go on when the change was undone, or made on all."""
    first, second, late = (nn.Parameter(torch.ones(5)) for _ in range(3))
    optimizer = cls([("first", first), ("second", second)], lr=1e-2, nonfinite="skip")
    for param in (first, second, late):
        param.grad = torch.ones(5)
    optimizer.step()
    group = optimizer.param_groups[0]
    for rank in (1, 0):
        if dist.get_rank() == rank:
            if change == "add":
                optimizer.add_param_group({"params": [("late", late)]})
            elif change == "replace":
                group["params"][1] = late
            else:
                del group["params"][1], group["param_names"][1]
        if rank == 1:
            what = {"add": "1 new ones, 'late'", "replace": "1 new ones, 'second'", "remove": "without 1, 'second'"}[change]
            before = first.detach().clone()
            with pytest.raises(ValueError, match=rf"rank 1: the parameters .* not on all ranks: here they are {what}; .* every rank"):
                optimizer.step()
            assert torch.equal(first.detach(), before)
    optimizer.step()
    assert bool((first.detach() < before).all())


@pytest.mark.ranks(2)
def test_a_parameter_stepped_alone_that_one_rank_has_replaced_is_refused_on_all() -> None:
    """All ranks raise where one has replaced a parameter that is stepped alone, and go on when all have."""
    params = [nn.Parameter(torch.ones(5)) for _ in range(2)]
    optimizer = so.StableAdamW([("first", params[0]), ("second", params[1])], lr=1e-2)

    def step() -> None:
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.ones(5)
        optimizer.step(param=optimizer.param_groups[0]["params"][0])

    step()
    late = nn.Parameter(torch.ones(5))
    if dist.get_rank() == 1:
        optimizer.param_groups[0]["params"][0] = late
    with pytest.raises(ValueError, match=r"rank 1: the parameters .* not on all ranks: here they are 1 new ones, 'first'"):
        step()
    optimizer.param_groups[0]["params"][0] = late
    step()


@pytest.mark.ranks(2)
def test_parameters_that_one_rank_has_removed_are_refused_where_the_rest_is_a_set_that_was_stepped_alone() -> None:
    """All ranks raise where one has removed so many that the others are a set it knows."""
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(300))
    optimizer = so.StableAdamW([{"params": [("a", a)]}, {"params": [("b", b)]}], lr=1e-2)
    for only in ((a,), None, (a,)):
        give_ones(a, b)
        optimizer.step(param=only)
    group = optimizer.param_groups[1]
    if dist.get_rank() == 0:
        optimizer.param_groups.pop()
    give_ones(a, b)
    with pytest.raises(ValueError, match=r"rank 0: the parameters .* not on all ranks: here they are without 1, 'b'"):
        optimizer.step()
    if dist.get_rank() == 0:
        optimizer.param_groups.append(group)
    optimizer.step()


@pytest.mark.ranks(2)
def test_a_failed_step_whose_exception_one_rank_keeps_changes_nothing() -> None:
    """What is known of a set does not depend on who keeps an exception alive, as a notebook does."""
    a, b, c = (nn.Parameter(torch.ones(count)) for count in (4, 5, 5))
    optimizer = so.StableAdamW([{"params": [("a", a)]}, {"params": [("b", b)]}], lr=1e-2, nonfinite="raise")
    give_ones(a, b)
    optimizer.step()
    a.grad = torch.full((4,), torch.nan)
    kept = None
    try:
        optimizer.step(param=(a,))
    except FloatingPointError as error:
        kept = error if dist.get_rank() == 0 else None
    give_ones(a, b, c)
    optimizer.step(param=(a,))
    optimizer.add_param_group({"params": [("c", c)]})
    optimizer.step()
    optimizer.step(param=(a,))
    assert (kept is None) == (dist.get_rank() != 0)
    assert float(optimizer.state[a]["step"]) == 4.0


@pytest.mark.ranks(2)
def test_metrics_of_a_parameter_of_which_only_one_rank_holds_state_are_on_all() -> None:
    """ShardedOptimizer, whose other rank holds nothing of a parameter that is trained from now on."""
    model, late = nn.Linear(6, 4), nn.Parameter(torch.ones(1), requires_grad=False)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(0.1)
    params = {"w": model.weight, "b": model.bias, "late": late}
    optimizer = so.ShardedOptimizer(list(params.items()), so.AdamW, lr=1e-2)
    for trained in (False, True):
        late.requires_grad_(trained)
        optimizer.zero_grad()
        (model(torch.ones(2, 6)).sum() * late.sum()).backward()
        optimizer.step()
        report: dict[str, Any] = {}
        for name, param in params.items():
            if param.requires_grad:
                report = optimizer.report_per_parameter_metrics(param, name, report)
        report = optimizer.dist_reduce_metrics(optimizer.pre_reduce_metrics(report))
        assert float(report["l2_norm/grad/w"]) == pytest.approx(96**0.5, rel=0.1)
        assert ("l2_norm/grad/late" in report) == trained


@pytest.mark.ranks(2)
def test_an_optimizer_does_not_keep_a_destroyed_process_group_alive() -> None:
    """torch.distributed owns it, and ends its threads."""
    param = nn.Parameter(torch.ones(3))
    group = dist.new_group([0, 1])
    optimizer = so.StableAdamW([("w", param)], lr=1e-2, process_group=group)
    give_ones(param)
    optimizer.step()
    own = weakref.ref(optimizer.own_group())
    assert own() is not None
    dist.destroy_process_group(own())
    gc.collect()
    assert own() is None


def give_ones(*params: nn.Parameter) -> None:
    for param in params:
        param.grad = torch.ones_like(param)


@pytest.mark.ranks(2)
def test_options_that_differ_between_ranks_are_refused() -> None:
    """An option that decides what a step does is compared like a hyperparameter, also when it is set later."""
    for name, values in (("nonfinite", ("skip", "allow")), ("nonfinite", ("skip", "raise")), ("max_skipped_steps", (2, 3))):
        param = nn.Parameter(torch.ones(3))
        optimizer = so.StableAdamW([("w", param)], lr=1e-2)
        param.grad = torch.ones(3)
        optimizer.step()
        setattr(optimizer, name, values[dist.get_rank()])
        before = param.detach().clone()
        with pytest.raises(ValueError, match=rf"ranks disagree about 'w': {name} is {values[0]} on rank 0, {values[1]} on rank 1"):
            optimizer.step()
        assert torch.equal(param.detach(), before)
        setattr(optimizer, name, values[0])
        optimizer.step()
    param = nn.Parameter(torch.ones(3))
    optimizer = so.StableAdamW([("w", param)], lr=1e-2, state_dtype=(torch.float32, torch.bfloat16)[dist.get_rank()])
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"ranks disagree about 'w': state_dtype is fp32 on rank 0, bf16 on rank 1"):
        optimizer.step()


@pytest.mark.ranks(2)
def test_a_rank_that_leaves_out_a_step_is_named() -> None:
    """The others learn which rank is missing, and in a step of what, when the process group's time is over."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    param = nn.Parameter(torch.ones(3))
    params = [("weight", param), ("bias", nn.Parameter(torch.ones(2)))]
    optimizer = so.AdamW(params, lr=1e-2, nonfinite="skip", process_group=group)
    param.grad = torch.ones(3)
    optimizer.step()
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"rank 1 did not take part in a step of 'weight' and 1 other tensor: .*equally often"):
            optimizer.step()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("cls", CLASSES)
def test_fsdp2_models_may_be_moved_and_cast_between_steps(cls: type) -> None:
    """Before the first step and after steps; training goes on with the same bits where nothing changed."""
    conversions = {
        "to": lambda model: model.to("cpu"),
        "cpu": lambda model: model.cpu(),
        "float": lambda model: model.float(),
        "to_empty": lambda model: model.to_empty(device="cpu"),
        "to_bfloat16": lambda model: model.to(torch.bfloat16),
    }
    expected = None
    for name, convert in conversions.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 17), nn.Linear(17, 4))
        fully_shard(model[0])
        fully_shard(model)
        optimizer = cls(model.parameters(), lr=1e-2)
        for step in range(3):
            if name != "to_empty" or step != 0:
                convert(model)
            if name == "to_empty":
                with torch.no_grad():
                    for seed, param in enumerate(model.parameters()):
                        generator = torch.Generator().manual_seed(seed)
                        param.to_local().copy_(torch.randn(param.to_local().shape, generator=generator))
            inputs = torch.randn(3, 8, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
            model(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        values = [param.full_tensor().detach().clone() for param in model.parameters()]
        assert all(value.isfinite().all() for value in values), name
        if name in ("to", "cpu", "float"):
            expected = values if expected is None else expected
            assert all(map(torch.equal, values, expected)), name


@pytest.mark.ranks(2)
def test_a_parameter_may_be_sharded_otherwise_between_steps() -> None:
    """Under the same object, with its state: the next step makes the layout anew."""
    mesh = init_device_mesh("cpu", (2,))
    start, grad = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    whole, param = nn.Parameter(start.clone()), nn.Parameter(distribute_tensor(start, mesh, [Shard(0)]))
    alone = dist.new_subgroups(1)[0]
    reference = so.StableAdamW([("w", whole)], lr=1e-2, process_group=alone)
    optimizer = so.StableAdamW([("w", param)], lr=1e-2)
    for placement in (Shard(0), Shard(1), Replicate(), Shard(0)):
        torch.utils.swap_tensors(param, nn.Parameter(param.detach().redistribute(placements=[placement])))
        for key, value in optimizer.state[param].items() if param in optimizer.state else ():
            if key != "step":
                optimizer.state[param][key] = value.redistribute(placements=[placement])
        param.grad, whole.grad = distribute_tensor(grad, mesh, [placement]), grad
        optimizer.step()
        reference.step()
        assert torch.equal(param.full_tensor(), whole), placement
        assert optimizer.metrics() == reference.metrics(), placement


# ------------------------------------------------------------------------------------------------------------------ hyperparameters


def test_empty_groups_learn_the_reference_learning_rate_too() -> None:
    """On some ranks of a pipeline a group is empty; a parameter that is moved there decays by the peak, not by the present lr."""
    param = nn.Parameter(torch.ones(3))
    optimizer = so.AdamW([{"params": [param]}, {"params": []}], lr=0.0, decouple_lr=True, weight_decay=1e-4)
    for lr in (0.0, 1e-2, 1e-3):
        for group in optimizer.param_groups:
            group["lr"] = lr
        param.grad = torch.ones(3)
        optimizer.step()
    assert [group["reference_lr"] for group in optimizer.param_groups] == [1e-2, 1e-2]


def test_the_step_that_learns_the_reference_learning_rate_decays_by_it() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = so.AdamW([param], lr=0.0, decouple_lr=True, weight_decay=0.5, betas=(0.0, 0.0))
    optimizer.param_groups[0]["lr"] = 1e-2
    param.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(param.detach(), torch.full((3,), 0.5))


def test_a_tensor_lr_that_groups_share_is_shared_after_loading() -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = so.AdamW([{"params": [param]} for param in params], lr=torch.tensor(1e-2))
    optimizer.load_state_dict(optimizer.state_dict())
    first, second = optimizer.param_groups
    assert first["lr"] is second["lr"]


def test_parameters_of_a_removed_group_are_freed() -> None:
    kept, removed = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = so.AdamW([{"params": [kept]}, {"params": [removed]}])
    kept.grad = removed.grad = torch.ones(2)
    optimizer.step()
    optimizer.param_groups.pop()
    del optimizer.state[removed]
    is_gone = ref(removed)
    del removed
    for _ in range(2):
        optimizer.step()
    gc.collect()
    assert is_gone() is None


def test_a_hyperparameter_that_a_group_has_lost_is_named() -> None:
    param = nn.Parameter(torch.ones(2))
    optimizer = so.StableAdamW([param])
    param.grad = torch.ones(2)
    del optimizer.param_groups[0]["betas"]
    with pytest.raises(ValueError, match=r"param_groups\[0\] has lost 'betas'"):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(2))


def test_a_key_that_nobody_declares_is_read_as_it_is_in_each_step() -> None:
    class Scaled(so.AdamW):
        _choose_algorithm = staticmethod(
            lambda group: replace(
                ADAM, coefficients=lambda group, step, scale: ADAM.coefficients(group, step, scale * group["layer_scale"])
            )
        )

    param = nn.Parameter(torch.ones(2))
    optimizer = Scaled([{"params": [param], "layer_scale": 1.0}], lr=0.1, weight_decay=0.0, backend="eager")
    moved = []
    for scale in (1.0, 0.0, 1.0):
        optimizer.param_groups[0]["layer_scale"] = scale
        before = param.detach().clone()
        param.grad = torch.ones(2)
        optimizer.step()
        moved.append(not torch.equal(before, param.detach()))
    assert moved == [True, False, True]
