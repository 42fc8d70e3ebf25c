"""Switches and hyperparameters that change while an optimizer runs."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import pydoc
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import sharded_optim as so
from sharded_optim import backends
from sharded_optim.formulas.hyperparameters import comparable

CLASSES = [so.Adam, so.AdamW, so.DecoupledAdamW, so.DecoupledSGDW, so.StableAdamW]
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def run(optimizer: torch.optim.Optimizer, param: nn.Parameter, steps: range) -> None:
    for step in steps:
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step)).to(param.dtype)
        optimizer.step()


def stepped(cls: type, steps: int = 3, dtype: torch.dtype = torch.float32, **options) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    param = nn.Parameter(torch.linspace(-1, 1, 13).to(dtype))
    optimizer = cls([param], lr=1e-2, **options)
    run(optimizer, param, range(steps))
    return optimizer, param


@every_class
def test_unknown_arguments_are_refused(cls: type) -> None:
    with pytest.raises(TypeError, match=rf"^{cls.__name__}\(\) got an unexpected keyword argument 'decoupled'"):
        cls([nn.Parameter(torch.ones(2))], lr=1e-3, decoupled=True)


def constructors(cls: type) -> dict[str, Callable]:
    """Ways to make an optimizer, by the name that its errors begin with."""
    return {cls.__name__: cls, "ShardedOptimizer": lambda params, **options: so.ShardedOptimizer(params, cls, **options)}


@every_class
@pytest.mark.parametrize(
    ("name", "value", "way_out"),
    [
        ("weigth_decay", 0.1, r"did you mean 'weight_decay'\?"),
        ("state_dtyp", None, r"did you mean 'state_dtype'\?"),
        ("wd", 0.1, "it takes params, .*weight_decay.*nonfinite"),
        ("fused", "cuda", "leave it out, or choose the backend with backend="),
        ("capturable", True, "a CUDA graph can capture any step"),
        ("maximize", True, "negate the loss"),
        ("differentiable", True, "use torch.optim"),
        ("parameters_as_bucket_view", True, "leave it out"),
        ("overlap_with_ddp", True, "leave it out"),
        ("consolidate_state_dict", True, "it is a method of ShardedOptimizer"),
        ("amsgrad", True, "leave it out|set it in the param groups"),
    ],
)
def test_an_unknown_argument_names_the_public_class_and_the_way_out(cls: type, name: str, value: object, way_out: str) -> None:
    if cls is so.DecoupledAdamW and name == "amsgrad":
        pytest.skip("DecoupledAdamW has it")
    for called, make in constructors(cls).items():
        with pytest.raises(TypeError, match=rf"^{called}\(\) got an unexpected keyword argument '{name}', of value .*; .*({way_out})"):
            make([nn.Parameter(torch.ones(2))], lr=1e-3, **{name: value})


@every_class
def test_errors_of_the_call_itself_name_the_public_class(cls: type) -> None:
    """A missing params, too many positional arguments, one given twice: what Python raises, and no class that is not exported."""
    for arguments, options, said in (
        ((), {}, "missing 1 required positional argument: 'params'"),
        (range(30), {}, "30|31"),
        ((1, 2), {"lr": 3}, "'lr'"),
    ):
        with pytest.raises(TypeError, match=rf"^{cls.__name__}\(\) .*({said})"):
            cls(*arguments, **options)
    with pytest.raises(TypeError, match=r"^ShardedOptimizer\b.* missing 2 required positional arguments: 'params' and 'optimizer_class'"):
        so.ShardedOptimizer()


def test_a_typing_error_in_an_own_argument_of_sharded_optimizer_is_corrected() -> None:
    with pytest.raises(TypeError, match=r"^ShardedOptimizer\(\) got .* 'bucket_size_mb', of value 25; did you mean 'bucket_mb'\?"):
        so.ShardedOptimizer(nn.Linear(2, 2), so.AdamW, bucket_size_mb=25)


@every_class
def test_switches_of_other_libraries_that_ask_for_nothing_pass(cls: type) -> None:
    names = (
        "fused",
        "capturable",
        "amsgrad",
        "maximize",
        "foreach",
        "differentiable",
        "parameters_as_bucket_view",
        "consolidate_state_dict",
    )
    for make in constructors(cls).values():
        for value in (None, False):
            make([nn.Parameter(torch.ones(2))], lr=1e-3, **dict.fromkeys(names, value))
        optimizer = make([nn.Parameter(torch.ones(2))], lr=1e-3, fused=True)
        assert "fused" not in optimizer.param_groups[0]


def test_what_an_error_says_about_amsgrad_works() -> None:
    optimizer = so.AdamW([{"params": [nn.Parameter(torch.ones(2))], "amsgrad": True}])
    run(optimizer, optimizer.param_groups[0]["params"][0], range(1))
    assert "max_exp_avg_sq" in optimizer.state[optimizer.param_groups[0]["params"][0]]


@every_class
def test_lr_may_come_from_groups_alone(cls: type) -> None:
    """It is also what decoupled weight decay refers to. Without any it is 1e-3, as in torch."""
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    for make in constructors(cls).values():
        optimizer = make([{"params": [a], "lr": 3e-4}, {"params": [b]}])
        assert [(group["lr"], group["reference_lr"]) for group in optimizer.param_groups] == [(3e-4, 3e-4), (1e-3, 1e-3)]


@every_class
@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.parametrize("before", [0, 1, 2])
def test_an_empty_group_is_kept_and_steps_nothing(cls: type, is_named: bool, before: int, tmp_path: Path) -> None:
    """As in torch, whose names of parameters are in all groups or in none. Trainers make a group for what decays, be it empty or not.

    `before` of two empty groups come before the others. State dicts, checkpoints and copies have them.
    """

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(3, 2)
        params = list(model.named_parameters() if is_named else model.parameters())
        empty = [{"params": [], "lr": 5e-3} for _ in range(2)]
        groups = [*empty[:before], {"params": params[:1], "weight_decay": 1e-4}, *empty[before:], {"params": params[1:]}]
        return model, cls(groups, lr=1e-2)

    def step(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = made()
    alone = copy.deepcopy(model)
    reference = cls([{"params": alone.weight, "weight_decay": 1e-4}, {"params": alone.bias}], lr=1e-2)
    lrs = [group["lr"] for group in optimizer.param_groups]
    for each in ((optimizer, model), (reference, alone)):
        step(*each)
    so.checkpoint.save(tmp_path, 1, model=model, optimizer=optimizer)
    others = [made(), made(), (None, copy.deepcopy(optimizer))]
    others[0][1].load_state_dict(optimizer.state_dict())
    so.checkpoint.load(tmp_path, model=others[1][0], optimizer=others[1][1])
    for _, other in others:
        assert [group["lr"] for group in other.param_groups] == lrs
        assert [len(group["params"]) for group in other.param_groups] == [len(group["params"]) for group in optimizer.param_groups]
    optimizer.add_param_group({"params": []})
    optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(2)))] if is_named else nn.Parameter(torch.ones(2))})
    for each in ((optimizer, model), (reference, alone), others[1][::-1]):
        step(*each)
    assert torch.equal(model.weight, alone.weight)
    assert torch.equal(model.weight, others[1][0].weight)


@pytest.mark.parametrize(
    ("cls", "torchs"), [(so.Adam, torch.optim.Adam), (so.AdamW, torch.optim.AdamW), (so.DecoupledSGDW, torch.optim.SGD)]
)
def test_a_state_dict_of_torch_with_an_empty_group_is_continued(cls: type, torchs: type) -> None:
    for order in (1, -1):
        params = [nn.Parameter(torch.ones(3))]
        groups = [{"params": [], "lr": 5e-3}, {"params": params}][::order]
        other, ours = torchs([dict(group) for group in groups], lr=1e-2), cls([dict(group) for group in groups], lr=1.0)
        run(other, params[0], range(2))
        ours.load_state_dict(other.state_dict())
        assert [group["lr"] for group in ours.param_groups] == [5e-3, 1e-2][::order]


def test_arguments_in_another_librarys_order_warn_with_both_readings() -> None:
    """torch has eps before weight_decay, optimi after it."""
    params, betas = [nn.Parameter(torch.ones(2))], (0.9, 0.999)
    torchs = "takes weight_decay before eps, as optimi does, and torch has eps first"
    for cls in (so.Adam, so.AdamW, so.StableAdamW):
        with pytest.warns(UserWarning, match=f"{cls.__name__} {torchs}.* pass eps=1e-08, weight_decay=0.1, by keyword") as found:
            cls(params, 1e-3, betas, 1e-8, 0.1)
        assert found[0].filename == __file__
        with pytest.warns(UserWarning, match=f"{torchs}.* pass eps=1e-08 and the weight_decay that you want"):
            cls(params, 1e-3, betas, 1e-8)
    with pytest.warns(UserWarning, match=r"DecoupledAdamW takes eps before weight_decay.* pass eps=1e-06, weight_decay=0.01, by keyword"):
        so.DecoupledAdamW(params, 1e-3, betas, 1e-2, 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        so.AdamW(params, 1e-3, betas, 0.1, 1e-8)
        so.Adam(params, 1e-3, betas, 0.0, 1e-4)
        so.AdamW(params, 1e-3, betas, 0.1, 1e-3)
        so.DecoupledAdamW(params, 1e-3, betas, 1e-8, 1e-9)


@every_class
def test_help_shows_every_option_with_its_default_and_its_meaning(cls: type) -> None:
    text, signature = pydoc.plain(pydoc.render_doc(cls)), inspect.signature(cls)
    assert "EngineOptions" not in text
    assert "SwitchOptions" not in text
    entries = re.findall(r"^    ((?:\w+, )*\w+): \S", inspect.getdoc(cls) or "", re.MULTILINE)
    assert set(signature.parameters) <= {name for entry in entries for name in entry.split(", ")}
    assert {"state_dtype", "layout", "rounding_seed", "kahan_sum", "gradient_release"} <= signature.parameters.keys()
    assert signature.parameters["max_skipped_steps"].default == 100
    cls(nn.Linear(2, 2).parameters(), **{name: each.default for name, each in signature.parameters.items() if name != "params"})


@every_class
def test_foreach_calls_a_backend_once_for_all_tensors_or_once_for_each_with_the_same_bits(cls: type, monkeypatch) -> None:
    from sharded_optim.backends.cpu import BACKEND

    sizes, results = [], []
    update = type(BACKEND).update
    monkeypatch.setattr(type(BACKEND), "update", lambda self, algorithm, operands, *args: sizes.append(len(operands)))
    for foreach, expected in ((None, [3]), (True, [3]), (False, [1, 1, 1])):
        params = [nn.Parameter(torch.ones(n)) for n in (1, 5, 7)]
        optimizer = cls(params, lr=1e-2, foreach=foreach)
        for param in params:
            param.grad = torch.linspace(-1, 1, param.numel())
        sizes.clear()
        optimizer.step()
        assert sizes == expected
    monkeypatch.setattr(type(BACKEND), "update", update)
    for foreach in (None, True, False):
        params = [nn.Parameter(torch.ones(n)) for n in (1, 5, 7)]
        optimizer = cls(params, lr=1e-2, foreach=foreach)
        for param in params:
            param.grad = torch.linspace(-1, 1, param.numel())
        optimizer.step()
        results.append(torch.cat([param.detach() for param in params]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@every_class
def test_triton_is_an_import_error_where_it_cannot_be_had(cls: type, monkeypatch) -> None:
    params = [nn.Parameter(torch.ones(2))]
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs the triton package: pip install triton"):
        cls(params, lr=1e-3, triton=True)
    assert importlib.util.find_spec is not backends.find_spec
    for options in ({"triton": True, "backend": "eager"}, {"triton": False, "backend": "triton"}):
        with pytest.raises(ValueError, match=r"triton=\w+ contradicts backend="):
            cls(params, lr=1e-3, **options)
    assert backends.candidates("auto", None) == ("cpu", "triton", "eager")
    assert backends.candidates("auto", False) == ("cpu", "eager")
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    assert backends.candidates("auto", True) == ("triton",)


def test_momentum_that_begins_late_begins_with_the_gradient() -> None:
    """As in torch, whose buffer then is the gradient; under a schedule of momentum from 0."""
    optimizer, param = stepped(so.DecoupledSGDW)
    reference = torch.optim.SGD([nn.Parameter(param.detach().clone())], lr=1e-2)
    assert set(optimizer.state[param]) == {"step"}
    for each, p in ((optimizer, param), (reference, reference.param_groups[0]["params"][0])):
        each.param_groups[0]["momentum"] = 0.9
        run(each, p, range(3, 8))
    torch.testing.assert_close(param, reference.param_groups[0]["params"][0], rtol=1e-6, atol=1e-7)


def test_dampened_momentum_cannot_begin_late() -> None:
    """Its first step alone takes up the whole gradient, and which that is would be forgotten."""
    optimizer, param = stepped(so.DecoupledSGDW)
    optimizer.param_groups[0] |= {"momentum": 0.9, "dampening": 0.5}
    before = param.detach().clone()
    with pytest.raises(ValueError, match=r"lacks 'momentum_buffer' after 3 steps, and it cannot begin late"):
        run(optimizer, param, range(3, 4))
    assert torch.equal(param, before)


def test_nesterov_needs_momentum_and_no_dampening() -> None:
    for options in ({}, {"momentum": 0.9, "dampening": 0.1}):
        with pytest.raises(ValueError, match="nesterov=True needs momentum > 0 and dampening = 0"):
            so.DecoupledSGDW([nn.Parameter(torch.ones(2))], lr=0.1, nesterov=True, **options)


@pytest.mark.parametrize("cls", [so.Adam, so.AdamW, so.DecoupledAdamW])
def test_amsgrad_that_begins_late_begins_with_the_second_moment(cls: type) -> None:
    optimizer, param = stepped(cls)
    optimizer.param_groups[0]["amsgrad"] = True
    run(optimizer, param, range(3, 4))
    state = optimizer.state[param]
    assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])


@every_class
def test_kahan_compensation_that_is_switched_off_is_dropped(cls: type) -> None:
    """Kept, it would be added to another value when switched on again."""
    optimizer, param = stepped(cls, dtype=torch.bfloat16)
    assert optimizer.state[param]["kahan_comp"].any()
    optimizer.param_groups[0]["kahan_sum"] = False
    run(optimizer, param, range(3, 4))
    assert "kahan_comp" not in optimizer.state[param]
    optimizer.param_groups[0]["kahan_sum"] = True
    run(optimizer, param, range(4, 5))
    assert optimizer.state[param]["kahan_comp"].any()


@every_class
def test_a_state_dict_without_kahan_compensation_starts_it_at_zero(cls: type) -> None:
    optimizer, param = stepped(cls, dtype=torch.bfloat16)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        del state["kahan_comp"]
    optimizer.load_state_dict(saved)
    assert not optimizer.state[param]["kahan_comp"].any()


def test_state_of_an_unstepped_optimizer_of_another_family_is_refused() -> None:
    """It has no state that could tell: SGD never has, and others not before their first step."""
    params = [nn.Parameter(torch.ones(3))]
    for ours, theirs in (
        (so.AdamW(params, lr=1.0), torch.optim.SGD(params, lr=0.1)),
        (so.DecoupledSGDW(params, lr=1.0), torch.optim.AdamW(params, lr=0.1)),
    ):
        with pytest.raises(ValueError, match=r"param_groups\[0\] has '(betas|momentum)', which this optimizer does not have"):
            ours.load_state_dict(theirs.state_dict())
        assert ours.param_groups[0]["lr"] == 1.0


def test_l2_of_nothing_loads_into_any_adam() -> None:
    """torch's Adam without weight decay is continued by StableAdamW, which refuses L2."""
    params = [nn.Parameter(torch.ones(3))]
    other = torch.optim.Adam(params, lr=0.1)
    run(other, params[0], range(2))
    optimizer = so.StableAdamW(params, lr=1.0, decay_form="corrected")
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["decay_form"] == "corrected"
    other.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match=r"decay_form='l2' is not supported by StableAdamW.*the state dict's param_groups\[0\]"):
        optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("other", [torch.optim.RAdam, torch.optim.NAdam, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.Adagrad])
@every_class
def test_state_of_torchs_other_optimizers_is_refused(cls: type, other: type) -> None:
    """Their groups and state look like Adam's or SGD's."""
    params = [nn.Parameter(torch.ones(3))]
    theirs, ours = other(params, lr=0.1), cls(params, lr=1.0)
    run(theirs, params[0], range(2))
    with pytest.raises(
        ValueError, match=r"param_groups\[0\] is from an optimizer of torch that is not continued here; .*Adam, AdamW, SGD and Muon"
    ):
        ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 1.0


def test_switches_of_a_group_that_contradict_each_other_are_refused() -> None:
    params = [nn.Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match="decouple_lr=True means decay_form='decoupled', got decay_form='coupled'"):
        so.AdamW([{"params": params, "decay_form": "coupled", "decouple_lr": True}], lr=1e-2)


def test_a_parameter_stepped_alone_is_reported_by_its_last_step() -> None:
    """Also if an earlier one stepped it together with others."""
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = so.StableAdamW([("a", a), ("b", b)], lr=1e-2, weight_decay=0.0)
    for param in (a, b):
        param.grad = torch.ones(4)
    for only, lr in (((a, b), 1e-2), ((a,), 1e-3), ((a, b), 1e-4)):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step(param=only)
        for param, name in ((a, "a"), (b, "b")):
            if any(param is each for each in only):
                update = optimizer.report_per_parameter_metrics(param, name, {})[f"l2_norm/update/{name}"]
                assert update.item() == pytest.approx(lr * 2, rel=1e-3)
    assert optimizer.metrics()["rms/a"] == pytest.approx(1.0, rel=1e-3)


def test_hyperparameters_are_compared_by_their_values_whatever_holds_them() -> None:
    def key(value: object) -> str:
        return repr(comparable(value))

    for alike in (
        (0.5, np.float32(0.5), torch.tensor(0.5)),
        (5, 5.0, np.int64(5)),
        (True, np.True_),
        ([1.0, 2.0], (1, 2), np.array([1, 2.0])),
    ):
        assert len({key(value) for value in alike}) == 1, alike
    long = np.zeros(5000)
    other = long.copy()
    other[2500] = 1.0
    for a, b in ((1.00001, 1.00002), (torch.tensor([1.00001]), torch.tensor([1.00002])), (long, other), ("a", "b"), ({"a": 1}, {"a": 2})):
        assert key(a) != key(b)


# ---------------------------------------------------------------------------------------------------- the optimizer came too early


@pytest.mark.parametrize("cls", CLASSES)
def test_a_first_step_without_any_gradient_warns_once_with_the_cause_and_the_way_out(cls: type) -> None:
    def warnings_of(steps: int, *, grad: bool = False, **options) -> list[str]:
        param = nn.Parameter(torch.ones(3))
        optimizer = cls([param], lr=1e-2, **options)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for _ in range(steps):
                param.grad = torch.ones(3) if grad else None
                optimizer.step()
                grad = False
        assert all(each.filename == __file__ for each in found)
        return [str(each.message) for each in found]

    (message,) = warnings_of(3)
    assert "fully_shard" in message
    assert "build it from model.parameters() after wrapping" in message
    assert warnings_of(3, grad=True) == []
    assert warnings_of(3, gradient_release=True) == []


def check_who_is_warned_of_missing_gradients() -> None:
    """All ranks, of an optimizer that was built before fully_shard; none, where another rank has gradients."""
    rank = dist.get_rank()
    for cls in (so.AdamW, so.StableAdamW):
        model = nn.Linear(8, 4)
        optimizer = cls(model.parameters(), lr=1e-2)
        fully_shard(model)
        model(torch.ones(2, 8)).sum().backward()
        with pytest.warns(UserWarning, match="after the optimizer was built"):
            optimizer.step()
    param = nn.Parameter(torch.ones(3))
    optimizer = so.StableAdamW([(f"stage{rank}", param)], lr=1e-2)
    param.grad = torch.ones(3) if rank else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_ranks_are_warned_of_missing_gradients_together() -> None:
    ranks.run(check_who_is_warned_of_missing_gradients, 2)
