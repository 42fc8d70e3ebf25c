"""What torch, its schedulers, its GradScaler and its distributed checkpoint expect of an optimizer."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from variants import AmsgradAdamW, MomentumSGDW

import sharded_optim as so

pytestmark = pytest.mark.filterwarnings("ignore:weight_decay")
CLASSES = [so.Adam, so.AdamW, so.DecoupledAdamW, AmsgradAdamW, so.DecoupledSGDW, MomentumSGDW, so.StableAdamW]
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, scheduler: object = None) -> None:
    for step in steps:
        torch.manual_seed(step)
        x = torch.randn(4, 5, dtype=next(model.parameters()).dtype)
        optimizer.zero_grad()
        (model(x).square().sum() * (100 if step % 5 == 3 else 1)).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def resumed(cls: type, change: Callable, dtype: torch.dtype = torch.float32) -> None:
    """5 steps, `change(model, optimizer) -> (model, optimizer)`, 5 steps equal 10 steps."""
    straight, model = make_model(dtype), make_model(dtype)
    take_steps(straight, cls(straight.parameters(), lr=1e-2), range(10))
    optimizer = cls(model.parameters(), lr=1e-2)
    take_steps(model, optimizer, range(5))
    model, optimizer = change(model, optimizer)
    take_steps(model, optimizer, range(5, 10))
    assert_equal(straight, model)


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip_continues_bitwise(cls: type, dtype: torch.dtype) -> None:
    """Also with bf16 parameters, whose fp32 moments torch's own loading would round."""

    def change(model: nn.Module, optimizer: torch.optim.Optimizer):
        fresh = cls(model.parameters(), lr=0.5)
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for param in model.parameters():
            dtypes = {key: value.dtype for key, value in fresh.state[param].items()}
            assert dtypes == dict.fromkeys(dtypes, torch.float32) | ({"kahan_comp": dtype} if dtype == torch.bfloat16 else {})
        return model, fresh

    resumed(cls, change, dtype)


@every_class
def test_state_dict_survives_torch_save(cls: type, tmp_path) -> None:
    def change(model: nn.Module, optimizer: torch.optim.Optimizer):
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        fresh = cls(model.parameters(), lr=0.5)
        fresh.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
        return model, fresh

    resumed(cls, change)


@every_class
def test_deepcopy_and_pickle_continue_bitwise(cls: type) -> None:
    resumed(cls, lambda model, optimizer: copy.deepcopy((model, optimizer)))
    resumed(cls, lambda model, optimizer: pickle.loads(pickle.dumps((model, optimizer))))


@every_class
def test_pickle_keeps_the_options(cls: type) -> None:
    model = make_model()
    optimizer = cls(model.parameters(), lr=0.0, nonfinite="raise", state_dtype=torch.bfloat16, max_lr=0.3)
    copied = pickle.loads(pickle.dumps(optimizer))
    assert (copied.nonfinite, copied.state_dtype) == ("raise", torch.bfloat16)
    copied.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert copied.param_groups[1]["reference_lr"] == 0.3


@every_class
@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoint_state_dicts_continue_bitwise(cls: type, flatten: bool) -> None:
    def change(model: nn.Module, optimizer: torch.optim.Optimizer):
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        fresh = cls(model.parameters(), lr=0.5)
        set_optimizer_state_dict(model, fresh, saved, options=options)
        return model, fresh

    resumed(cls, change)
    resumed(cls, change, torch.bfloat16)


@every_class
def test_asking_a_fresh_optimizer_for_its_state_does_not_count_a_step(cls: type) -> None:
    """torch steps with zero gradients to allocate state (pytorch#164929). Fails if torch renames the function that does."""
    straight, model = make_model(), make_model()
    take_steps(straight, cls(straight.parameters(), lr=1e-2), range(5))
    optimizer = cls(model.parameters(), lr=1e-2)
    saved = get_optimizer_state_dict(model, optimizer)
    assert {float(state["step"]) for state in saved["state"].values()} == {0.0}
    take_steps(model, optimizer, range(5))
    assert_equal(straight, model)


@every_class
def test_a_first_step_at_lr_0_counts(cls: type) -> None:
    """Unlike torch's allocation: warm-up from 0 updates the moments."""
    model = make_model()
    optimizer = cls(model.parameters(), lr=0.0)
    before = copy.deepcopy(model)
    take_steps(model, optimizer, range(1))
    assert_equal(model, before)
    for param in model.parameters():
        assert optimizer.state[param]["step"] == 1
        assert all(value.any() for value in optimizer.state[param].values())


def test_load_is_all_or_nothing_and_names_what_does_not_fit() -> None:
    model = make_model()
    optimizer = so.AdamW(model.named_parameters(), lr=1e-2)
    take_steps(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    for spoil, words in (
        (lambda s: s["state"][2].pop("exp_avg_sq"), "2.weight.*lacks 'exp_avg_sq'"),
        (lambda s: s["state"][1].update(exp_avg=torch.zeros(3)), r"0.bias. has shape \(3,\), the parameter \(7,\)"),
        (lambda s: s["param_groups"].append({"params": []}), r"groups of \[4, 0\] parameters, the optimizer of \[4\]"),
    ):
        saved = copy.deepcopy(before)
        spoil(saved)
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(saved)
        after = optimizer.state_dict()
        for index, state in before["state"].items():
            for key, value in state.items():
                assert torch.equal(after["state"][index][key], value)


def test_a_state_dict_with_a_step_that_is_no_number_changes_nothing() -> None:
    model = make_model()
    optimizer = so.AdamW(model.parameters(), lr=1e-2)
    take_steps(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][3]["step"] = torch.zeros(2)
    saved["param_groups"][0]["lr"] = 0.5
    with pytest.raises(ValueError, match=r"saved 'step' of 'param_groups\[0\]\.params\[3\]' has shape \(2,\)"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 1e-2


@every_class
def test_frozen_parameters_get_no_state(cls: type) -> None:
    """As in torch, so that their checkpoints have the same entries."""
    model = make_model()
    model[0].weight.requires_grad_(False)
    optimizer = cls(model.parameters(), lr=1e-2)
    saved = get_optimizer_state_dict(model, optimizer)
    assert "0.weight" not in saved["state"]
    assert "0.bias" in saved["state"]


def test_a_skipped_step_does_not_move_the_learned_reference_lr() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = so.StableAdamW([param], lr=0.0, decouple_lr=True)
    optimizer.param_groups[0]["lr"] = 5e-3
    param.grad = torch.full((3,), torch.nan)
    optimizer.step()
    assert optimizer.param_groups[0]["reference_lr"] == 0.0
    param.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.param_groups[0]["reference_lr"] == 5e-3


def test_user_hooks_around_loading_see_converted_and_restored_state() -> None:
    """A pre-hook may convert a foreign state dict; a post-hook sees the fp32 moments."""
    model = make_model(torch.bfloat16)
    optimizer = so.AdamW(model.parameters(), lr=1e-2)
    take_steps(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["m"] = state.pop("exp_avg")
    seen = []

    def convert(_, state_dict):
        return {
            **state_dict,
            "state": {k: {("exp_avg" if n == "m" else n): v for n, v in s.items()} for k, s in state_dict["state"].items()},
        }

    optimizer.register_load_state_dict_pre_hook(convert)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.extend(s["exp_avg"].dtype for s in o.state.values()))
    optimizer.load_state_dict(saved)
    assert seen == [torch.float32] * 4


def test_loading_a_torch_adamw_state_dict_continues_its_trajectory() -> None:
    """Groups lack our keys and bring torch's; the state is the same."""
    model, other = make_model(), make_model()
    reference = torch.optim.AdamW(other.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-6)
    take_steps(other, reference, range(5))
    model.load_state_dict(other.state_dict())
    optimizer = so.AdamW(model.parameters(), lr=1.0)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 1e-2
    take_steps(other, reference, range(5, 10))
    take_steps(model, optimizer, range(5, 10))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7)


SCHEDULERS = {
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=30),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=30),
    "LinearLR": lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=10),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5), torch.optim.lr_scheduler.CosineAnnealingLR(o, 25)],
        milestones=[5],
    ),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, base_lr=1e-4, max_lr=1e-2, step_size_up=5, cycle_momentum=True),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_drive_lr_and_momenta(scheduler: str) -> None:
    """OneCycleLR and CyclicLR also write betas; the trajectory equals torch's AdamW under the same scheduler."""
    model, other = make_model(), make_model()
    ours = so.AdamW(model.parameters(), lr=1e-2, eps=1e-6)
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-6)
    take_steps(model, ours, range(20), SCHEDULERS[scheduler](ours))
    take_steps(other, theirs, range(20), SCHEDULERS[scheduler](theirs))
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
    assert ours.param_groups[0]["betas"] == theirs.param_groups[0]["betas"]
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@every_class
def test_tensor_lr_equals_float_lr_and_follows_fill(cls: type) -> None:
    """Schedulers fill a tensor lr in place, and loading replaces the object."""
    model, other = make_model(), make_model()
    lr = torch.tensor(1e-2, dtype=torch.float64)
    ours, theirs = cls(model.parameters(), lr=lr), cls(other.parameters(), lr=1e-2)
    for step in range(6):
        lr.fill_(1e-2 / (step + 1))
        theirs.param_groups[0]["lr"] = 1e-2 / (step + 1)
        take_steps(model, ours, range(step, step + 1))
        take_steps(other, theirs, range(step, step + 1))
    assert_equal(model, other)
    ours.param_groups[0]["lr"] = torch.tensor([0.0])
    before = copy.deepcopy(model)
    take_steps(model, ours, range(1))
    assert_equal(model, before)


def decay_of_one_step(optimizer: torch.optim.Optimizer, param: Tensor) -> float:
    """Fraction by which a step with zero gradient shrinks a parameter of ones."""
    with torch.no_grad():
        param.fill_(1.0)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    return 1.0 - float(param.detach()[0])


def test_decoupled_decay_refers_to_the_optimizers_own_peak_lr() -> None:
    """Not to `initial_lr`, which OneCycleLR sets to max_lr / 25: there Composer decays 25 times too much."""
    param = nn.Parameter(torch.ones(3))
    optimizer = so.DecoupledAdamW([param], lr=1e-2, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=10)
    for _ in range(10):
        share = optimizer.param_groups[0]["lr"] / 1e-2
        assert decay_of_one_step(optimizer, param) == pytest.approx(1e-2 * share, abs=1e-7)
        scheduler.step() if optimizer.state[param]["step"] < 10 else None


def test_decoupled_decay_with_lr_0_at_construction_refers_to_the_largest_lr_so_far() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = so.DecoupledAdamW([param], lr=0.0, weight_decay=1e-2)
    decays = []
    for lr in (0.0, 1e-3, 4e-3, 2e-3, 1e-3):
        optimizer.param_groups[0]["lr"] = lr
        decays.append(decay_of_one_step(optimizer, param))
    assert decays == pytest.approx([0.0, 1e-2, 1e-2, 5e-3, 2.5e-3], abs=1e-7)


def test_max_lr_is_the_reference_and_per_group() -> None:
    a, b, c = (nn.Parameter(torch.ones(3)) for _ in range(3))
    groups = [{"params": [a]}, {"params": [b], "max_lr": 4e-2}]
    optimizer = so.AdamW(groups, lr=1e-2, weight_decay=1e-2, decouple_lr=True, max_lr=2e-2)
    optimizer.add_param_group({"params": [c], "lr": 2e-2})
    assert [decay_of_one_step(optimizer, p) for p in (a, b, c)] == pytest.approx([5e-3, 2.5e-3, 1e-2], abs=1e-7)


@every_class
def test_a_parameter_added_late_gets_the_first_steps_bias_correction(cls: type) -> None:
    """`step` is per parameter: Adam's first step is the sign of the gradient times lr, SGD's the gradient times lr."""
    model = make_model()
    optimizer = cls(model.parameters(), lr=1e-2, weight_decay=0.0)
    take_steps(model, optimizer, range(5))
    late = nn.Parameter(torch.zeros(4))
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.tensor([1.0, -2.0, 3.0, -4.0])
    optimizer.step()
    first_step = -1e-2 * (late.grad if issubclass(cls, so.DecoupledSGDW) else late.grad.sign())
    torch.testing.assert_close(late.detach(), first_step, rtol=1e-5, atol=0)
    assert optimizer.state[late]["step"] == 1


@every_class
def test_hooks_and_closure(cls: type) -> None:
    model = make_model()
    optimizer = cls(model.parameters(), lr=1e-2)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model(torch.ones(2, 5)).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    assert calls == ["pre", "post"] * 2


@every_class
def test_named_parameters_keep_their_names(cls: type) -> None:
    model = make_model()
    optimizer = cls(model.named_parameters(), lr=1e-2)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]


@every_class
def test_gradients_are_never_written(cls: type) -> None:
    model = make_model()
    optimizer = cls(model.parameters(), lr=1e-2)
    take_steps(model, optimizer, range(3))
    grads = [param.grad.clone() for param in model.parameters()]
    versions = [param.grad._version for param in model.parameters()]
    optimizer.step()
    assert versions == [param.grad._version for param in model.parameters()]
    for param, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(param.grad, grad)


@every_class
def test_grad_scaler_gives_the_unscaled_trajectory_and_skips_on_inf(cls: type) -> None:
    model, other = make_model(), make_model()
    ours, theirs = cls(model.parameters(), lr=1e-2), cls(other.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for step in range(6):
        x = torch.randn(4, 5)
        ours.zero_grad()
        loss = model(x).square().sum() * (torch.inf if step == 3 else 1)
        scaler.scale(loss).backward()
        if step == 4:
            scaler.unscale_(ours)
        scaler.step(ours)
        scaler.update()
        if step == 3:
            assert scaler.get_scale() == 2.0**9
            assert ours.skipped_steps == 1
        else:
            theirs.zero_grad()
            other(x).square().sum().backward()
            theirs.step()
    assert {float(state["step"]) for state in ours.state.values()} == {5.0}
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@every_class
def test_replaced_parameters_are_stepped(cls: type) -> None:
    """Accelerate writes new tensors into group["params"] after construction."""
    model = make_model()
    optimizer = cls(model.parameters(), lr=1e-2)
    take_steps(model, optimizer, range(1))
    for layer in (model[0], model[2]):
        for name in ("weight", "bias"):
            setattr(layer, name, nn.Parameter(getattr(layer, name).detach().clone()))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    before = copy.deepcopy(model)
    take_steps(model, optimizer, range(1))
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert not torch.equal(p, q)


def test_init_state_is_idempotent_and_allocates_what_the_first_step_would() -> None:
    model = make_model()
    optimizer = so.StableAdamW(model.parameters(), lr=1e-2, state_dtype=torch.bfloat16)
    optimizer.init_state()
    first = {id(value) for state in optimizer.state.values() for value in state.values()}
    optimizer.init_state()
    assert first == {id(value) for state in optimizer.state.values() for value in state.values()}
    assert {(key, value.dtype) for state in optimizer.state.values() for key, value in state.items()} == {
        ("step", torch.float32),
        ("exp_avg", torch.bfloat16),
        ("exp_avg_sq", torch.bfloat16),
    }


def test_non_contiguous_parameters_step_like_contiguous_ones() -> None:
    base = torch.randn(6, 4)
    transposed, plain = nn.Parameter(base.t()), nn.Parameter(base.t().contiguous())
    assert not transposed.is_contiguous()
    for param in (transposed, plain):
        optimizer = so.StableAdamW([param], lr=1e-2)
        for step in range(5):
            param.grad = torch.full((4, 6), step - 2.5)
            optimizer.step()
    assert torch.equal(transposed, plain)


def test_repr_names_the_backend() -> None:
    model = make_model()
    optimizer = so.StableAdamW(model.parameters(), lr=1e-2)
    assert "backend: cpu or triton or eager, chosen in the first step" in repr(optimizer)
    take_steps(model, optimizer, range(1))
    assert "backend: cpu" in repr(optimizer)


@every_class
def test_groups_that_are_cleared_and_added_again_keep_their_reference_lr(cls: type) -> None:
    """As Composer does when it wraps a model."""
    param = nn.Parameter(torch.ones(3))
    optimizer = cls([{"params": [param], "max_lr": 1e-2}], lr=1e-4)
    (group,) = optimizer.param_groups
    optimizer.param_groups.clear()
    optimizer.add_param_group({**group, "lr": 1e-5})
    assert optimizer.param_groups[0]["reference_lr"] == 1e-2
    optimizer.param_groups.clear()
    optimizer.add_param_group({**group, "max_lr": 2e-2})
    assert optimizer.param_groups[0]["reference_lr"] == 2e-2


@every_class
def test_grad_scaler_and_no_gradients_at_all(cls: type) -> None:
    """It then gives found_inf as a Python number, on this rank perhaps alone."""
    param = nn.Parameter(torch.ones(3))
    optimizer = cls([param], lr=1e-2)
    optimizer.grad_scale, optimizer.found_inf = None, 0
    optimizer.step()
    param.grad = torch.ones(3)
    optimizer.found_inf = 1.0
    optimizer.step()
    assert torch.equal(param.detach(), torch.ones(3))
    optimizer.found_inf = 0.0
    optimizer.step()
    assert not torch.equal(param.detach(), torch.ones(3))


@pytest.mark.parametrize("cls", [so.AdamW, so.StableAdamW])
def test_groups_may_be_edited(cls: type) -> None:
    """Freezing takes parameters out of a group, surgery on a model puts others in."""
    model = make_model()
    optimizer = cls(model.parameters(), lr=1e-2)
    take_steps(model, optimizer, range(1))
    params = optimizer.param_groups[0]["params"]
    bias = next(param for param in params if param.ndim == 1)
    params[:] = [param for param in params if param.ndim == 1]
    take_steps(model, optimizer, range(1, 2))
    params[:] = [bias]
    take_steps(model, optimizer, range(2, 3))
    new = nn.Parameter(torch.ones(11))
    params.append(new)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state[new]["step"] == 1
    assert optimizer.state[bias]["step"] == 4


def test_defaults_of_torch_change_neither_checkpoints_nor_reports(tmp_path: Path) -> None:
    """Neither another dtype nor another device: what the library makes lies where it is used, in the dtype that it needs."""
    sizes = (("w", 7), ("v", 70), ("one", 1))

    def run(folder: Path) -> tuple[list[Tensor], dict[str, float]]:
        params = {name: nn.Parameter(torch.linspace(-1, 1, numel, dtype=torch.float32, device="cpu")) for name, numel in sizes}
        model = nn.ParameterDict(params)
        optimizer = so.StableAdamW(model.named_parameters(), lr=1e-2)

        def step(scale: float) -> None:
            for param in model.values():
                param.grad = param.detach() * scale
            optimizer.step()

        step(3.0)
        so.checkpoint.save(folder, 1, model=model, optimizer=optimizer, extra={"seen": torch.ones(3, dtype=torch.float32, device="cpu")})
        so.checkpoint.async_save(folder, 2, model=model, optimizer=optimizer).wait()
        step(5.0)
        so.checkpoint.load(folder, model=model, optimizer=optimizer)
        so.checkpoint.verify(folder)
        step(7.0)
        report: dict[str, Tensor] = {}
        for name, param in model.items():
            optimizer.report_per_parameter_metrics(param, name, report)
        return [param.detach().clone() for param in model.values()], {key: float(value) for key, value in report.items()}

    expected = run(tmp_path / "as usual")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            values, report = run(tmp_path / "other defaults")
    finally:
        torch.set_default_dtype(before)
    assert all(map(torch.equal, values, expected[0]))
    assert report == expected[1]


@pytest.mark.parametrize("count", [math.nan, -1.0, 2.0**25])
def test_a_saved_step_counter_that_counts_nothing_is_refused(count: float) -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = so.AdamW([("w", param)], lr=1e-2)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = torch.tensor(count)
    with pytest.raises(ValueError, match=r"saved 'step' of 'w' is .*; it must be a number of steps, at most 16,777,216"):
        optimizer.load_state_dict(saved)
