"""Weight decay shrinks a parameter by what its convention says, at every point of a schedule, and values convert between conventions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from variants import examples

import sharded_optim as so
from sharded_optim.optimizers import convert_weight_decay as conversion

SCHEDULE = (0.0, 0.25, 1.0, 0.6, 0.1)  # multipliers of the peak learning rate
high_decay_is_meant = pytest.mark.filterwarnings("ignore:weight_decay=.*is high:UserWarning")


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(*(shape or (3,))))


def decay_of_one_step(optimizer: torch.optim.Optimizer, *params: nn.Parameter) -> list[float]:
    """Fractions by which one step with zero gradients shrinks parameters of ones."""
    for param in params:
        with torch.no_grad():
            param.fill_(1.0)
        param.grad = torch.zeros_like(param)
    optimizer.step()
    return [1.0 - float(param.detach().flatten()[0]) for param in params]


# ---------------------------------------------------------------------------------------------------------------- one step's decay

AMOUNTS: dict[str, Callable[[float, float, float], float]] = {
    "coupled": lambda lr, peak, weight_decay: lr * weight_decay,
    "decoupled": lambda lr, peak, weight_decay: lr / peak * weight_decay,
    "corrected": lambda lr, peak, weight_decay: lr * lr / peak * weight_decay,
}


@high_decay_is_meant
@pytest.mark.parametrize("cls", [so.Adam, so.AdamW, so.StableAdamW], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("form", AMOUNTS)
def test_a_step_shrinks_each_group_by_its_forms_amount_of_its_own_reference(cls: type, form: str) -> None:
    params, peaks, decays = [parameter(2, 3), parameter(5), parameter()], [0.5, 0.2, 0.8], [0.3, 0.7, 0.05]
    groups = [
        {"params": [params[0]]},
        {"params": [params[1]], "lr": peaks[1], "weight_decay": decays[1]},
        {"params": [params[2]], "max_lr": peaks[2], "weight_decay": decays[2]},
    ]
    optimizer = cls(groups, lr=peaks[0], weight_decay=decays[0], decay_form=form)
    for share in SCHEDULE:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = share * peak
        expected = [AMOUNTS[form](share * peak, peak, decay) for peak, decay in zip(peaks, decays, strict=True)]
        assert decay_of_one_step(optimizer, *params) == pytest.approx(expected, abs=1e-7)


@high_decay_is_meant
@pytest.mark.parametrize("cls", [so.DecoupledAdamW, so.DecoupledSGDW], ids=lambda cls: cls.__name__)
def test_the_decoupled_classes_take_other_forms_per_group(cls: type) -> None:
    params = {form: parameter(4) for form in AMOUNTS}
    groups = [{"params": [param], "decay_form": form} for form, param in params.items()]
    optimizer = cls(groups, lr=0.5, weight_decay=0.3)
    for share in SCHEDULE:
        for group in optimizer.param_groups:
            group["lr"] = share * 0.5
        expected = [amount(share * 0.5, 0.5, 0.3) for amount in AMOUNTS.values()]
        assert decay_of_one_step(optimizer, *params.values()) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("grad", [0.0, 0.75, -0.25])
def test_l2_adds_lambda_times_the_parameter_to_the_gradient(grad: float) -> None:
    """So the moments of Adam's first step are those of the sum, and its step is the sum's sign times lr; the size of lambda cancels."""
    lr, beta1, beta2, weight_decay = 1e-2, 0.8, 0.95, 0.3
    start = torch.tensor([[2.0, -1.5, 0.5], [4.0, -0.125, 1.0]])
    params = [nn.Parameter(start.clone()), nn.Parameter(start.clone())]
    groups = [{"params": [params[0]]}, {"params": [params[1]], "weight_decay": 2 * weight_decay}]
    optimizer = so.Adam(groups, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay, eps=0.0)
    for param in params:
        param.grad = torch.full_like(start, grad)
    optimizer.step()
    for param, decay in zip(params, (weight_decay, 2 * weight_decay), strict=True):
        total = grad + decay * start
        torch.testing.assert_close(optimizer.state[param]["exp_avg"], (1 - beta1) * total, rtol=1e-6, atol=0)
        torch.testing.assert_close(optimizer.state[param]["exp_avg_sq"], (1 - beta2) * total.square(), rtol=1e-6, atol=0)
        torch.testing.assert_close(param.detach(), start - lr * total.sign(), rtol=1e-6, atol=0)
        torch.testing.assert_close(param.grad, torch.full_like(start, grad), rtol=0, atol=0)


def test_l2_of_sgd_without_momentum_is_coupled_decay() -> None:
    """The one algorithm without moments, where L2 is a decay of lr * lambda."""
    param = parameter(7)
    optimizer = so.DecoupledSGDW([{"params": [param], "decay_form": "l2"}], lr=0.5, weight_decay=0.3)
    for share in SCHEDULE:
        optimizer.param_groups[0]["lr"] = share * 0.5
        assert decay_of_one_step(optimizer, param) == pytest.approx([share * 0.5 * 0.3], abs=1e-7)


# ---------------------------------------------------------------------------------------------------------------------- conversion

LR, STEPS_PER_EPOCH = 6e-4, 1_234.0
FROM_FRACTION: dict[str, Callable[[float], float]] = {  # each convention's value for a decay of d per step
    "coupled": lambda d: d / LR,
    "decoupled": lambda d: d,
    "corrected": lambda d: d / LR,
    "half_life": lambda d: math.log(2) / -math.log(1 - d),
    "ema_steps": lambda d: 1 / d,
    "ema_epochs": lambda d: 1 / (d * STEPS_PER_EPOCH),
}
ALIASES = {"torch": "coupled", "optimi": "coupled", "composer": "decoupled", "paper": "decoupled", "adamc": "corrected"}
ALIASES |= {"tau_iter": "ema_steps", "tau_epoch": "ema_epochs"}
NAMES = [*FROM_FRACTION, *ALIASES]
corrected_is_meant = pytest.mark.filterwarnings("ignore:converted from:UserWarning")


def converted(value: float, from_: str, to: str) -> float:
    return so.convert_weight_decay(value, from_, to, lr=LR, steps_per_epoch=STEPS_PER_EPOCH)


@corrected_is_meant
@pytest.mark.parametrize("from_", NAMES)
@pytest.mark.parametrize("to", NAMES)
@given(d=st.floats(1e-7, 0.9))
@settings(deadline=None, max_examples=examples(10))
def test_every_pair_of_conventions_follows_the_formulas_and_round_trips(from_: str, to: str, d: float) -> None:
    """The formulas are those of the decay d of one step; the half-life's is written without log1p, hence the tolerance at small d."""
    value = FROM_FRACTION[ALIASES.get(from_, from_)](d)
    result = converted(value, from_, to)
    assert result == pytest.approx(FROM_FRACTION[ALIASES.get(to, to)](d), rel=1e-15 / d + 1e-12)
    assert converted(result, to, from_) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_no_decay_is_no_decay_in_every_convention(name: str) -> None:
    durations = ("half_life", "ema_steps", "ema_epochs", "tau_iter", "tau_epoch")
    nothing = math.inf if name in durations else 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert converted(0.0, "decoupled", name) == nothing
        assert converted(nothing, name, "decoupled") == 0.0


def test_known_numbers() -> None:
    assert so.convert_weight_decay(0.1, "torch", "decoupled", lr=6e-4) == pytest.approx(6e-5, rel=1e-12)
    assert so.convert_weight_decay(6e-5, "composer", "optimi", lr=6e-4) == pytest.approx(0.1, rel=1e-12)
    assert so.convert_weight_decay(0.5, "decoupled", "half_life") == pytest.approx(1.0, rel=1e-12)
    assert so.convert_weight_decay(2.0, "half_life", "decoupled") == pytest.approx(1 - math.sqrt(0.5), rel=1e-12)
    assert so.convert_weight_decay(0.1, "torch", "tau_iter", lr=1e-3) == pytest.approx(10_000, rel=1e-12)
    assert so.convert_weight_decay(0.1, "torch", "tau_epoch", lr=1e-3, steps_per_epoch=2_500) == pytest.approx(4.0, rel=1e-12)


def test_width_multiplies_a_coupled_value_and_leaves_a_decoupled_one() -> None:
    for m in (0.5, 1.0, 3.0, 64.0):
        assert so.convert_weight_decay(0.1, "coupled", "coupled", lr=LR, width_multiplier=m) == pytest.approx(0.1 * m, rel=1e-12)
        assert so.convert_weight_decay(0.1, "coupled", "coupled", width_multiplier=m) == pytest.approx(0.1 * m, rel=1e-12)
        assert so.convert_weight_decay(0.1, "decoupled", "decoupled", lr=LR, width_multiplier=m) == 0.1
        assert so.convert_weight_decay(0.1, "coupled", "decoupled", lr=LR, width_multiplier=m) == pytest.approx(0.1 * LR, rel=1e-12)
        same = so.convert_weight_decay(0.1, "coupled", "coupled", lr=LR, to_lr=LR / m)
        assert so.convert_weight_decay(0.1, "coupled", "coupled", lr=LR, width_multiplier=m) == pytest.approx(same, rel=1e-12)


@pytest.mark.parametrize("value", [1.0, 2.5])
def test_a_coupled_value_of_1_or_more_converts_to_another_width_without_lr(value: float) -> None:
    """The learning rate cancels, so nothing says that the decay of a step is not small."""
    expected = so.convert_weight_decay(value, "coupled", "coupled", lr=LR, width_multiplier=8)
    assert so.convert_weight_decay(value, "coupled", "coupled", width_multiplier=8) == pytest.approx(expected, rel=1e-12)


def test_doubling_the_learning_rate_halves_a_coupled_value() -> None:
    assert so.convert_weight_decay(0.1, "coupled", "coupled", lr=LR, to_lr=2 * LR) == pytest.approx(0.05, rel=1e-12)
    assert so.convert_weight_decay(6e-5, "decoupled", "coupled", to_lr=2 * LR) == pytest.approx(0.05, rel=1e-12)
    assert so.convert_weight_decay(0.1, "corrected", "corrected", lr=LR, to_lr=2 * LR) == pytest.approx(0.05, rel=1e-12)
    assert so.convert_weight_decay(0.1, "decoupled", "decoupled", lr=LR, to_lr=2 * LR) == 0.1


@high_decay_is_meant
@pytest.mark.parametrize("half_life", [7, 100, 350])
def test_after_a_half_life_half_of_a_weight_is_left(half_life: int) -> None:
    d = so.convert_weight_decay(half_life, "half_life", "decoupled")
    param = parameter(3)
    optimizer = so.DecoupledAdamW([param], lr=1e-2, weight_decay=d)
    for _ in range(half_life):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.5), rtol=half_life * 2.0**-24, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_l2_converts_to_itself_alone(name: str) -> None:
    for from_, to in (("l2", name), (name, "l2")):
        with pytest.raises(ValueError, match=rf"cannot be converted from '{from_}' to '{to}'.*tune it anew"):
            converted(0.1, from_, to)
    assert converted(0.1, "l2", "l2") == 0.1


@pytest.mark.parametrize("name", [name for name in NAMES if ALIASES.get(name, name) != "corrected"])
def test_corrected_from_or_to_another_warns_at_the_callers_line(name: str) -> None:
    for from_, to in ((name, "adamc"), ("corrected", name)):
        with pytest.warns(UserWarning, match=rf"from '{from_}' to '{to}' at the peak learning rate only") as caught:
            so.convert_weight_decay(FROM_FRACTION[ALIASES.get(from_, from_)](0.01), from_, to, lr=LR, steps_per_epoch=STEPS_PER_EPOCH)
        assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert converted(0.1, "corrected", "adamc") == pytest.approx(0.1, rel=1e-12)
        assert converted(0.1, "coupled", "torch") == pytest.approx(0.1, rel=1e-12)


@corrected_is_meant
@pytest.mark.parametrize(
    ("value", "from_", "to", "options", "words"),
    [
        (0.1, "adamw", "torch", {}, r"from_ must be one of coupled, .*half_life.*torch.*tau_epoch, got 'adamw'"),
        (0.1, "torch", "Composer", {"lr": LR}, r"to must be one of .*composer.*, got 'Composer'"),
        (0.1, "torch", "decoupled", {}, r"lr is needed .*'coupled'; pass lr="),
        (0.1, "torch", "decoupled", {"to_lr": LR}, r"lr is needed .*'coupled'; pass lr="),
        (0.1, "coupled", "coupled", {"to_lr": LR}, r"lr is needed .*'coupled'; pass lr="),
        (0.1, "decoupled", "corrected", {}, r"lr is needed .*'corrected'; pass lr="),
        (0.1, "decoupled", "ema_epochs", {}, r"steps_per_epoch is needed .*'ema_epochs'; pass steps_per_epoch="),
        (9.0, "tau_epoch", "decoupled", {}, r"steps_per_epoch is needed .*'ema_epochs'; pass steps_per_epoch="),
        (1.0, "decoupled", "half_life", {}, r"1.0 of 'decoupled' .*leaves nothing.*below 1"),
        (2e3, "torch", "decoupled", {"lr": 1e-3}, r"'torch' shrinks a parameter by 2.0 .*below 1"),
        (1.0, "ema_steps", "decoupled", {}, r"'ema_steps' shrinks .*below 1"),
        (1e-3, "half_life", "decoupled", {}, r"'half_life' shrinks .*below 1"),
        (0.5, "ema_epochs", "decoupled", {"steps_per_epoch": 2}, r"'ema_epochs' shrinks .*below 1"),
        (-0.1, "torch", "decoupled", {"lr": LR}, r"value must be a finite number >= 0 for .*, got -0.1"),
        (math.nan, "composer", "paper", {}, r"value must be a finite number >= 0 for .*, got nan"),
        (math.inf, "composer", "paper", {}, r"value must be a finite number >= 0 for .*, got inf"),
        (-0.1, "l2", "l2", {}, r"value must be a finite number >= 0 for .*, got -0.1"),
        (0.0, "half_life", "decoupled", {}, r"value must be a number > 0 for .*, got 0.0"),
        (-5.0, "tau_iter", "decoupled", {}, r"value must be a number > 0 for .*, got -5.0"),
        (math.nan, "ema_steps", "decoupled", {}, r"value must be a number > 0 for .*, got nan"),
        (0.1, "torch", "decoupled", {"lr": 0.0}, r"lr must be a finite number > 0, got 0.0"),
        (0.1, "torch", "torch", {"lr": LR, "to_lr": -LR}, r"to_lr must be a finite number > 0, got -0.0006"),
        (0.1, "torch", "torch", {"lr": math.inf}, r"lr must be a finite number > 0, got inf"),
        (0.1, "torch", "torch", {"width_multiplier": 0}, r"width_multiplier must be a finite number > 0, got 0"),
        (0.1, "decoupled", "tau_epoch", {"steps_per_epoch": -3}, r"steps_per_epoch must be a finite number > 0, got -3"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_the_way_out(value: float, from_: str, to: str, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        so.convert_weight_decay(value, from_, to, **options)


# ---------------------------------------------------------------------------------------------------------------------- trajectory


def warmup_and_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    warmup = steps // 10

    def share(step: int) -> float:
        return step / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def trained(build: Callable[[list[nn.Parameter]], torch.optim.Optimizer], steps: int = 200) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((17, 5), (13,), (1,), (2, 3, 7))]
    optimizer = build(params)
    scheduler = warmup_and_cosine(optimizer, steps)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
        scheduler.step()
    return [param.detach() for param in params]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference of two lists of tensors, relative to the norm per element of each."""
    return max(float((x - y).abs().max() / y.square().mean().sqrt()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("cls", [so.AdamW, so.StableAdamW], ids=lambda cls: cls.__name__)
def test_converted_decay_gives_the_coupled_trajectory_under_a_schedule(cls: type) -> None:
    weight_decay = so.convert_weight_decay(0.1, "torch", "decoupled", lr=6e-4)
    coupled = trained(lambda params: cls(params, lr=6e-4, weight_decay=0.1))
    decoupled = trained(lambda params: cls(params, lr=6e-4, weight_decay=weight_decay, decouple_lr=True))
    assert distance(decoupled, coupled) < 2e-6
    none = trained(lambda params: cls(params, lr=6e-4, weight_decay=0.0))
    assert distance(none, coupled) > 1e-3


# ------------------------------------------------------------------------------------------------------------------------- warning

DECOUPLED: dict[str, Callable] = {
    "DecoupledAdamW": so.DecoupledAdamW,
    "DecoupledSGDW": so.DecoupledSGDW,
    "Adam": lambda *args, **kwargs: so.Adam(*args, decouple_lr=True, **kwargs),
    "AdamW": lambda *args, **kwargs: so.AdamW(*args, decouple_lr=True, **kwargs),
    "StableAdamW": lambda *args, **kwargs: so.StableAdamW(*args, decouple_lr=True, **kwargs),
}


@pytest.mark.parametrize("name", DECOUPLED)
def test_high_decoupled_decay_warns_once_of_the_largest_at_the_callers_line(name: str) -> None:
    groups = [{"params": [parameter()], "weight_decay": decay} for decay in (0.0, 2e-3, 0.125, 1e-2)]
    with pytest.warns(UserWarning, match=r"weight_decay=0.125 is high.*by 0.875; .*convert_weight_decay") as caught:
        DECOUPLED[name]([*groups, {"params": [parameter()]}], lr=1e-2, weight_decay=1e-3)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("name", DECOUPLED)
def test_the_warning_begins_at_a_thousandth(name: str) -> None:
    with pytest.warns(UserWarning, match=r"weight_decay=0.001 is high"):
        DECOUPLED[name]([parameter()], lr=1e-2, weight_decay=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DECOUPLED[name]([{"params": [parameter()]}, {"params": [parameter()], "weight_decay": 0.0}], lr=1e-2, weight_decay=9.99e-4)


@pytest.mark.parametrize(
    ("cls", "form"), [(so.Adam, "l2"), *((cls, form) for cls in (so.Adam, so.AdamW, so.StableAdamW) for form in ("coupled", "corrected"))]
)
def test_decay_that_the_learning_rate_multiplies_never_warns(cls: type, form: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls([{"params": [parameter()]}, {"params": [parameter()], "weight_decay": 0.5}], lr=1e-2, weight_decay=0.1, decay_form=form)


def test_one_decoupled_group_among_coupled_ones_is_the_one_that_warns() -> None:
    groups = [{"params": [parameter()], "weight_decay": 0.5}, {"params": [parameter()], "weight_decay": 0.02, "decay_form": "decoupled"}]
    with pytest.warns(UserWarning, match=r"weight_decay=0.02 is high") as caught:
        so.AdamW(groups, lr=1e-2)
    assert len(caught) == 1


# -------------------------------------------------------------------------------------------------------------- reference lr, keys

REFERRING = pytest.mark.parametrize("name", ["DecoupledSGDW", "Adam"])


@high_decay_is_meant
@REFERRING
@pytest.mark.parametrize(("lr", "max_lr"), [(3e-2, None), (1e-4, 3e-2)])
def test_one_cycle_does_not_move_the_reference(name: str, lr: float, max_lr: float | None) -> None:
    """Whatever OneCycleLR writes into `lr`, `initial_lr` and `max_lr`; the reference is the lr at construction, or the `max_lr` given."""
    param = parameter()
    optimizer = DECOUPLED[name]([param], lr=lr, weight_decay=1e-2, max_lr=max_lr)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-2, total_steps=10)
    shares = []
    for step in range(10):
        shares.append(optimizer.param_groups[0]["lr"] / 3e-2)
        assert decay_of_one_step(optimizer, param) == pytest.approx([1e-2 * shares[-1]], abs=1e-7)
        if step < 9:
            scheduler.step()
    assert min(shares) < 1e-3
    assert max(shares) == pytest.approx(1.0, rel=1e-12)


@high_decay_is_meant
@REFERRING
def test_warm_up_from_0_refers_to_the_largest_lr_so_far(name: str) -> None:
    """Of each group."""
    params = [parameter() for _ in range(2)]
    optimizer = DECOUPLED[name]([{"params": [param]} for param in params], lr=0.0, weight_decay=1e-2)
    decays = []
    for lr in (0.0, 0.0, 2e-3, 8e-3, 4e-3, 0.0, 1e-3):
        for factor, group in enumerate(optimizer.param_groups, start=1):
            group["lr"] = factor * lr
        decays += decay_of_one_step(optimizer, *params)
    expected = [0.0, 0.0, 1e-2, 1e-2, 5e-3, 0.0, 1.25e-3]
    assert decays[::2] == pytest.approx(expected, abs=1e-7)
    assert decays[1::2] == pytest.approx(expected, abs=1e-7)


@high_decay_is_meant
@REFERRING
def test_a_late_group_refers_to_its_own_lr_or_max_lr(name: str) -> None:
    params = [parameter() for _ in range(4)]
    optimizer = DECOUPLED[name]([params[0]], lr=1e-2, weight_decay=1e-2)
    optimizer.param_groups[0]["lr"] = 5e-3
    decay_of_one_step(optimizer, params[0])
    optimizer.add_param_group({"params": [params[1]]})
    optimizer.add_param_group({"params": [params[2]], "lr": 4e-2})
    optimizer.add_param_group({"params": [params[3]], "lr": 1e-2, "max_lr": 4e-2})
    assert decay_of_one_step(optimizer, *params) == pytest.approx([5e-3, 1e-2, 1e-2, 2.5e-3], abs=1e-7)
    for group in optimizer.param_groups:
        group["lr"] = 2e-3
    assert decay_of_one_step(optimizer, *params) == pytest.approx([2e-3, 2e-3, 5e-4, 5e-4], abs=1e-7)


@high_decay_is_meant
def test_optimis_keys_of_a_group_choose_its_form_of_decay() -> None:
    """`decouple_lr` and `decouple_wd` of a group mean what they mean as arguments; what a group leaves open it inherits."""
    keys = [{}, {"decouple_wd": True}, {"decouple_lr": True}, {"decouple_wd": True, "decouple_lr": True}, {"decouple_wd": False}]
    keys.append({"decouple_lr": False})
    params = [parameter() for _ in keys]
    adam = so.Adam([{"params": [param]} | key for param, key in zip(params, keys, strict=True)], lr=0.1, weight_decay=0.2, max_lr=0.4)
    assert [group["decay_form"] for group in adam.param_groups] == ["l2", "coupled", "decoupled", "decoupled", "l2", "l2"]
    assert decay_of_one_step(adam, *params)[1:4] == pytest.approx([0.02, 0.05, 0.05], abs=1e-7)

    for cls in (so.AdamW, so.StableAdamW):
        params = [parameter() for _ in range(3)]
        groups = [{"params": [params[0]]}, {"params": [params[1]], "decouple_lr": False}, {"params": [params[2]], "decouple_lr": True}]
        optimizer = cls(groups, lr=0.1, weight_decay=0.2, max_lr=0.4, decouple_lr=True)
        assert decay_of_one_step(optimizer, *params) == pytest.approx([0.05, 0.02, 0.05], abs=1e-7)


@pytest.mark.parametrize("cls", [so.Adam, so.AdamW, so.DecoupledAdamW, so.StableAdamW], ids=lambda cls: cls.__name__)
def test_optimis_betas_of_a_group_are_its_betas(cls: type) -> None:
    """A group with beta1 or beta2 moves as one with the pair in `betas`."""
    spelled = [{"beta1": 0.5}, {"beta2": 0.8}, {"beta1": 0.5, "beta2": 0.8}]
    paired = [{"betas": (0.5, 0.95)}, {"betas": (0.9, 0.8)}, {"betas": (0.5, 0.8)}]
    results = []
    for keys in (spelled, paired):
        params = [parameter(5) for _ in keys]
        optimizer = cls([{"params": [param]} | key for param, key in zip(params, keys, strict=True)], lr=1e-2, betas=(0.9, 0.95))
        assert [group["betas"] for group in optimizer.param_groups] == [(0.5, 0.95), (0.9, 0.8), (0.5, 0.8)]
        for step in range(4):
            for param in params:
                param.grad = torch.arange(5) - 1.5 * step
            optimizer.step()
        results.append([param.detach() for param in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[0][0], results[0][1])
    with pytest.raises(ValueError, match=r"betas must be (two )?numbers in \[0, 1\)"):
        cls([{"params": [parameter()], "beta1": 1.0}], lr=1e-2)


def test_the_type_of_conventions_has_all_that_there_are() -> None:
    assert set(get_args(conversion.Convention)) == {*conversion.CONVENTIONS, *conversion.ALIASES}
