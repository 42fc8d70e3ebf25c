"""State dicts of torch's, Composer's and optimi's optimizers continue in ours, on the trajectory where they were saved."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import composer_formulas as composer
import optimi
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import sharded_optim as so
from sharded_optim.step import foreign_state

SHAPES = [(), (1,), (5,), (7, 3), (13, 11), (0,)]
SAVED, STEPS = 10, 30  # the other library takes the first 10 steps, then both take 20
AFTER_20_STEPS = 2e-6  # relative, fp32
BASE_LRS = (1e-2, 3e-3)

# Ours are built with hyperparameters that must not matter; and what of torch and Composer has the same keys has a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:weight_decay=.* is high", "ignore:the state dict may be from torch")


def start(dtype: torch.dtype = torch.float32, shapes: list[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    """Of the size 1, but 30 in every eleventh step: one before the state is saved, two after."""
    for index, param in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + index)
        grad = torch.randn(param.shape, generator=generator) * (30.0 if step % 11 == 4 else 1.0)
        param.grad = grad.to(param.dtype)


def schedule(step: int) -> float:
    """Warm-up over 5 steps, then a half cosine."""
    return (step + 1) / 5 if step < 5 else 0.5 * (1 + math.cos(math.pi * (step - 5) / STEPS))


def two_groups(params: list[nn.Parameter], decays: tuple[float, float]) -> list[dict[str, Any]]:
    halves = (params[::2], params[1::2])
    return [{"params": half, "lr": lr, "weight_decay": decay} for half, lr, decay in zip(halves, BASE_LRS, decays, strict=True)]


def train(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, scheduler: LambdaLR, steps: range) -> None:
    for step in steps:
        set_grads(params, step)
        optimizer.step()
        scheduler.step()


def relative_error(actual: list[nn.Parameter], expected: list[nn.Parameter]) -> float:
    pairs = [(a.detach().double(), e.detach().double()) for a, e in zip(actual, expected, strict=True) if a.numel()]
    return float(max((a - e).norm() / e.norm() for a, e in pairs))


def copied(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in params]


def assert_same(a: Any, b: Any) -> None:
    """Equal to the last bit, in dtype and in the type of everything."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@dataclass(frozen=True, kw_only=True)
class Case:
    """An optimizer of another library, and one of ours that takes over with hyperparameters that must all be replaced."""

    name: str
    theirs: Callable[[Any], torch.optim.Optimizer]  # param groups -> their optimizer
    ours: Callable[[Any], torch.optim.Optimizer]
    decays: tuple[float, float] = (0.1, 0.02)  # of the two param groups
    empty: bool = True  # whether theirs steps an empty tensor

    def shapes(self) -> list[tuple[int, ...]]:
        return [shape for shape in SHAPES if self.empty or 0 not in shape]


OTHER = {"lr": 0.5, "betas": (0.3, 0.6), "eps": 1e-2, "weight_decay": 0.3}
OTHER_SGD = {"lr": 0.5, "momentum": 0.3, "dampening": 0.7, "weight_decay": 0.3}
SMALL = (5e-4, 1e-4)  # fully decoupled decays
PLAIN = {"foreach": False, "triton": False}


def our_adam(groups: Any) -> so.Adam:
    return so.Adam(groups, **OTHER, decouple_wd=True)


def our_adam_l2(groups: Any) -> so.Adam:
    return so.Adam(groups, **OTHER)


def our_adamw(groups: Any) -> so.AdamW:
    return so.AdamW(groups, **OTHER, decouple_lr=True, max_lr=3.0)


def our_decoupled(groups: Any) -> so.DecoupledAdamW:
    return so.DecoupledAdamW(groups, **OTHER, amsgrad=True, max_lr=3.0)


def said(make: Callable[[Any], torch.optim.Optimizer], decay_form: str) -> Callable[[Any], torch.optim.Optimizer]:
    """One of ours whose user says that the state dict is torch's: Composer's has the same keys under a scheduler."""

    def make_and_say(groups: Any) -> torch.optim.Optimizer:
        optimizer = make(groups)
        for group in optimizer.param_groups:
            group["decay_form"] = decay_form
        return optimizer

    return make_and_say


def our_stable(groups: Any) -> so.StableAdamW:
    return so.StableAdamW(groups, **OTHER, decay_form="corrected", max_lr=3.0)


def our_sgdw(groups: Any) -> so.DecoupledSGDW:
    return so.DecoupledSGDW(groups, **OTHER_SGD, max_lr=3.0)


TORCH = [
    Case(name="torch.AdamW", theirs=lambda g: torch.optim.AdamW(g, betas=(0.9, 0.95)), ours=our_adamw),
    Case(name="torch.AdamW-into-decoupled", theirs=lambda g: torch.optim.AdamW(g, eps=1e-6), ours=said(our_decoupled, "coupled")),
    Case(name="torch.AdamW-amsgrad", theirs=lambda g: torch.optim.AdamW(g, amsgrad=True), ours=our_adamw),
    Case(
        name="torch.AdamW-amsgrad-into-decoupled", theirs=lambda g: torch.optim.AdamW(g, amsgrad=True), ours=said(our_decoupled, "coupled")
    ),
    Case(name="torch.AdamW-foreach", theirs=lambda g: torch.optim.AdamW(g, foreach=True), ours=our_adamw),
    Case(name="torch.AdamW-fused", theirs=lambda g: torch.optim.AdamW(g, fused=True), ours=our_adamw),
    Case(name="torch.Adam-l2", theirs=lambda g: torch.optim.Adam(g, betas=(0.8, 0.95)), ours=our_adam),
    Case(name="torch.Adam-l2-amsgrad", theirs=lambda g: torch.optim.Adam(g, amsgrad=True), ours=our_adam),
    Case(name="torch.SGD", theirs=lambda g: torch.optim.SGD(g), ours=said(our_sgdw, "l2")),
    Case(name="torch.SGD-momentum", theirs=lambda g: torch.optim.SGD(g, momentum=0.9), ours=said(our_sgdw, "l2")),
    Case(name="torch.SGD-dampening", theirs=lambda g: torch.optim.SGD(g, momentum=0.9, dampening=0.4), ours=said(our_sgdw, "l2")),
    Case(name="torch.SGD-nesterov", theirs=lambda g: torch.optim.SGD(g, momentum=0.9, nesterov=True), ours=said(our_sgdw, "l2")),
]
HIGH = (0.1, 0.02)  # decays, of which Composer warns
COMPOSER = [
    Case(name="composer.DecoupledAdamW-high", theirs=lambda g: composer.DecoupledAdamW(g), ours=our_decoupled, decays=HIGH),
    Case(name="composer.DecoupledSGDW-high", theirs=lambda g: composer.DecoupledSGDW(g, 1e-2, momentum=0.9), ours=our_sgdw, decays=HIGH),
    Case(name="composer.DecoupledAdamW", theirs=lambda g: composer.DecoupledAdamW(g), ours=our_decoupled, decays=SMALL),
    Case(name="composer.DecoupledAdamW-into-adamw", theirs=lambda g: composer.DecoupledAdamW(g, eps=1e-6), ours=our_adamw, decays=SMALL),
    Case(name="composer.DecoupledAdamW-amsgrad", theirs=lambda g: composer.DecoupledAdamW(g, amsgrad=True), ours=our_adamw, decays=SMALL),
    Case(name="composer.DecoupledSGDW", theirs=lambda g: composer.DecoupledSGDW(g, 1e-2), ours=our_sgdw, decays=SMALL),
    Case(
        name="composer.DecoupledSGDW-dampening",
        theirs=lambda g: composer.DecoupledSGDW(g, 1e-2, momentum=0.9, dampening=0.4),
        ours=our_sgdw,
        decays=SMALL,
    ),
    Case(
        name="composer.DecoupledSGDW-nesterov",
        theirs=lambda g: composer.DecoupledSGDW(g, 1e-2, momentum=0.9, nesterov=True),
        ours=our_sgdw,
        decays=SMALL,
    ),
]
OPTIMI = [
    Case(name="optimi.Adam-l2", theirs=lambda g: optimi.Adam(g, 1e-2, **PLAIN), ours=our_adam),
    Case(name="optimi.Adam-decouple_wd", theirs=lambda g: optimi.Adam(g, 1e-2, decouple_wd=True, **PLAIN), ours=our_adam_l2),
    Case(
        name="optimi.Adam-decouple_lr",
        theirs=lambda g: optimi.Adam(g, 1e-2, decouple_lr=True, max_lr=2e-2, **PLAIN),
        ours=our_adam_l2,
        decays=SMALL,
    ),
    Case(name="optimi.AdamW", theirs=lambda g: optimi.AdamW(g, 1e-2, betas=(0.8, 0.95), **PLAIN), ours=our_adamw),
    Case(
        name="optimi.AdamW-decouple_lr",
        theirs=lambda g: optimi.AdamW(g, 1e-2, decouple_lr=True, **PLAIN),
        ours=lambda g: so.AdamW(g, **OTHER),
        decays=SMALL,
    ),
    Case(name="optimi.AdamW-beta1-0", theirs=lambda g: optimi.AdamW(g, 1e-2, betas=(0.0, 0.99), **PLAIN), ours=our_adamw),
    Case(name="optimi.StableAdamW", theirs=lambda g: optimi.StableAdamW(g, 1e-2, **PLAIN), ours=our_stable, empty=False),
    Case(
        name="optimi.StableAdamW-decouple_lr",
        theirs=lambda g: optimi.StableAdamW(g, 1e-2, decouple_lr=True, max_lr=2e-2, **PLAIN),
        ours=our_stable,
        decays=SMALL,
        empty=False,
    ),
]
CASES = TORCH + COMPOSER + OPTIMI
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Another library's training after 10 steps."""

    params: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR


def train_theirs(case: Case, dtype: torch.dtype = torch.float32) -> Saved:
    params = start(dtype, case.shapes())
    optimizer = case.theirs(two_groups(params, case.decays))
    saved = Saved(params=params, optimizer=optimizer, scheduler=LambdaLR(optimizer, schedule))
    train(params, optimizer, saved.scheduler, range(SAVED))
    return saved


def taken_over(case: Case, theirs: Saved, state_dict: dict[str, Any]) -> Saved:
    """Our training at the same point: a scheduler as in a script that resumes, built before the state of both is loaded."""
    params = copied(theirs.params)
    optimizer = case.ours([{"params": params[::2]}, {"params": params[1::2]}])
    scheduler = LambdaLR(optimizer, schedule)
    optimizer.load_state_dict(state_dict)
    scheduler.load_state_dict(copy.deepcopy(theirs.scheduler.state_dict()))
    return Saved(params=params, optimizer=optimizer, scheduler=scheduler)


def assert_continues(ours: Saved, theirs: Saved, within: float = AFTER_20_STEPS) -> None:
    before = copied(theirs.params)
    for state in ours.optimizer.state.values():
        assert all(isinstance(value, Tensor) for value in state.values()), "tensors only can be saved flat"
    for each in (ours, theirs):
        train(each.params, each.optimizer, each.scheduler, range(SAVED, STEPS))
    for group, other in zip(ours.optimizer.param_groups, theirs.optimizer.param_groups, strict=True):
        assert group["lr"] == other["lr"]
    assert relative_error(before, theirs.params) > 1000 * within, "nothing was trained"
    assert relative_error(ours.params, theirs.params) <= within


@every_case
def test_their_trajectory_continues_in_ours(case: Case) -> None:
    """Two param groups with an lr and a weight decay each, under a scheduler; nothing of how ours was built remains."""
    theirs = train_theirs(case)
    assert_continues(taken_over(case, theirs, copy.deepcopy(theirs.optimizer.state_dict())), theirs)


@every_case
def test_their_trajectory_continues_from_a_file(case: Case, tmp_path) -> None:
    """torch.load's default unpickler is enough."""
    theirs = train_theirs(case)
    torch.save(theirs.optimizer.state_dict(), tmp_path / "theirs.pt")
    assert_continues(taken_over(case, theirs, torch.load(tmp_path / "theirs.pt")), theirs)


@every_case
def test_a_foreign_state_dict_is_not_modified(case: Case) -> None:
    """Neither by loading it nor by the steps that follow: their tensors are copied."""
    theirs = train_theirs(case)
    given = copy.deepcopy(theirs.optimizer.state_dict())
    before = copy.deepcopy(given)
    ours = taken_over(case, theirs, given)
    assert_same(given, before)
    train(ours.params, ours.optimizer, ours.scheduler, range(SAVED, SAVED + 2))
    assert_same(given, before)


@every_case
def test_what_was_taken_over_is_saved_as_ours_and_continues_bitwise(case: Case) -> None:
    """A second resume meets a state dict of ours, without the other library's switches in it."""
    theirs = train_theirs(case)
    first = taken_over(case, theirs, copy.deepcopy(theirs.optimizer.state_dict()))
    saved = copy.deepcopy(first.optimizer.state_dict())
    assert all("reference_lr" in group for group in saved["param_groups"])
    assert not {"foreach", "fused", "triton", "setup", "beta1", "decouple_lr", "max_lr"} & saved["param_groups"][0].keys()
    second = taken_over(case, theirs, saved)
    for each in (first, second):
        train(each.params, each.optimizer, each.scheduler, range(SAVED, SAVED + 5))
    assert_same([p.detach() for p in first.params], [p.detach() for p in second.params])


@pytest.mark.parametrize("case", [case for case in TORCH + COMPOSER if "-" not in case.name], ids=lambda case: case.name)
def test_a_parameter_they_had_not_stepped_yet_begins_in_ours(case: Case) -> None:
    """It has no state; its first step, in ours, is a first step."""
    theirs = train_theirs(case)
    late = nn.Parameter(torch.linspace(-1, 1, 3))
    theirs.optimizer.param_groups[0]["params"].append(late)
    ours_late = copied([late])[0]
    params = copied(theirs.params)
    optimizer = case.ours([{"params": [*params[::2], ours_late]}, {"params": params[1::2]}])
    optimizer.load_state_dict(copy.deepcopy(theirs.optimizer.state_dict()))
    for step in range(SAVED, STEPS):
        set_grads([*params, ours_late], step)
        set_grads([*theirs.params, late], step)
        optimizer.step()
        theirs.optimizer.step()
    assert relative_error([*params, ours_late], [*theirs.params, late]) <= AFTER_20_STEPS


# ------------------------------------------------------------------------------------------------------------------------- torch


@pytest.mark.parametrize(("theirs", "ours"), [(torch.optim.Adam, so.Adam), (torch.optim.AdamW, so.AdamW)])
def test_state_of_torch_before_2_7_is_adams_in_adam_and_adamws_in_adamw(theirs: type, ours: type) -> None:
    """There the two wrote the same group keys, so the class that is loaded into decides what weight_decay means."""
    case = Case(name="old", theirs=lambda g: theirs(g), ours=lambda g: ours(g, lr=0.5, betas=(0.3, 0.6)))
    saved = train_theirs(case)
    state_dict = copy.deepcopy(saved.optimizer.state_dict())
    for group in state_dict["param_groups"]:
        del group["decoupled_weight_decay"]
    assert_continues(taken_over(case, saved, state_dict), saved)


@pytest.mark.filterwarnings("error:the state dict may be")
@pytest.mark.parametrize(
    ("cls", "ours", "decay", "form"),
    [
        (torch.optim.AdamW, so.AdamW, 0.1, "coupled"),
        (torch.optim.AdamW, so.DecoupledAdamW, 0.1, "decoupled"),
        (torch.optim.SGD, so.DecoupledSGDW, 1e-2, "decoupled"),
        (composer.DecoupledAdamW, so.DecoupledAdamW, 1e-5, "decoupled"),
        (composer.DecoupledAdamW, so.DecoupledAdamW, 1e-3, "decoupled"),
        (composer.DecoupledAdamW, so.DecoupledAdamW, 0.1, "decoupled"),
        (composer.DecoupledSGDW, so.DecoupledSGDW, 5e-4, "decoupled"),
        (composer.DecoupledSGDW, so.DecoupledSGDW, 0.1, "decoupled"),
        (composer.DecoupledAdamW, so.AdamW, 0.1, "coupled"),
    ],
)
def test_the_class_decides_whether_state_is_of_torch_under_a_scheduler_or_of_composer(
    cls: type, ours: type, decay: float, form: str
) -> None:
    """Composer's optimizers are torch's subclasses: with `initial_lr` both have the same keys. Nothing is warned of."""
    params = start()
    theirs = cls(params, lr=1e-2, weight_decay=decay)
    LambdaLR(theirs, lambda step: 1.0)
    optimizer = ours(params, lr=0.5)
    optimizer.load_state_dict(theirs.state_dict())
    (group,) = optimizer.param_groups
    assert (group["decay_form"], group["weight_decay"]) == (form, decay)
    assert group["reference_lr"] == (1e-2 if form == "decoupled" else 0.5)
    optimizer.param_groups[0]["decay_form"] = "l2" if "SGD" in cls.__name__ else "coupled"  # the user says that it is torch's
    optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.param_groups[0]["decay_form"] == ("l2" if "SGD" in cls.__name__ else "coupled")


@pytest.mark.parametrize(("decay", "source", "form"), [(0.1, "torch", "coupled"), (1e-5, "Composer", "decoupled")])
def test_another_class_that_decays_as_composers_is_told_how_the_state_is_read(decay: float, source: str, form: str) -> None:
    theirs = torch.optim.AdamW(start(), lr=1e-2, weight_decay=decay)
    LambdaLR(theirs, lambda step: 1.0)
    optimizer = so.AdamW(start(), lr=0.5, decouple_lr=True)
    with pytest.warns(UserWarning, match=f"may be from torch with a scheduler or from Composer, and is read as {source}'s") as caught:
        optimizer.load_state_dict(theirs.state_dict())
    assert len(caught) == 1
    assert optimizer.param_groups[0]["decay_form"] == form


@pytest.mark.parametrize(
    ("ours", "theirs", "form"),
    [
        (so.DecoupledAdamW, torch.optim.AdamW, "coupled"),
        (so.Adam, torch.optim.AdamW, "coupled"),
        (so.AdamW, torch.optim.Adam, "l2"),
        (so.DecoupledSGDW, torch.optim.SGD, "l2"),
    ],
)
def test_what_torch_has_loaded_from_ours_is_torchs_when_it_comes_back(ours: type, theirs: type, form: str) -> None:
    """torch keeps our keys in its groups, where they no longer hold. So it does with a Kahan compensation."""
    param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    first = ours([param], lr=1e-2, weight_decay=0.1)
    first.step()
    between = theirs([param], lr=1e-2, weight_decay=0.1)
    between.load_state_dict(first.state_dict())
    back = ours([param], lr=1e-2)
    back.load_state_dict(between.state_dict())
    assert back.param_groups[0]["decay_form"] == form
    assert first.state[param]["kahan_comp"].any()
    assert not back.state[param]["kahan_comp"].any()
    assert not back.param_groups[0].keys() & {"fused", "capturable", "decoupled_weight_decay"}


@pytest.mark.parametrize("switches", [{"fused": False, "foreach": True}, {"fused": None}])
def test_own_groups_with_switches_of_torch_stay_own(switches: dict[str, Any]) -> None:
    """torchtitan writes them into groups; and a group that has loaded torch's state has other keys of torch's."""
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = so.DecoupledAdamW([{"params": [param], **switches}], lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    for _ in range(2):
        optimizer.step()
        again = so.DecoupledAdamW([{"params": [param], **switches}], lr=1e-2)
        again.load_state_dict(optimizer.state_dict())
        form = optimizer.param_groups[0]["decay_form"]
        assert (again.param_groups[0]["decay_form"], again.param_groups[0]["weight_decay"]) == (
            form,
            optimizer.param_groups[0]["weight_decay"],
        )
        optimizer.load_state_dict(theirs.state_dict())
        optimizer.param_groups[0]["decay_form"] = "decoupled"


def test_a_high_decay_of_torch_under_a_scheduler_is_warned_of_in_a_class_of_composers_name() -> None:
    """29 % of the parameters in 5 steps, if it is torch's."""
    param = nn.Parameter(torch.ones(3))
    theirs = torch.optim.SGD([param], lr=1e-2, momentum=0.9, weight_decay=0.1)
    LambdaLR(theirs, schedule)
    with pytest.warns(UserWarning, match=r"read as Composer's: weight_decay up to 0.1 is the fraction"):
        so.DecoupledSGDW([param]).load_state_dict(theirs.state_dict())


def test_maximize_of_torch_is_refused() -> None:
    """It turns the step around, which ours does not do."""
    params = start()
    theirs = torch.optim.AdamW(params, maximize=True)
    set_grads(params, 0)
    theirs.step()
    with pytest.raises(ValueError, match=r"maximize=True is not supported in the state dict's param_groups\[0\]"):
        so.AdamW(start(), lr=1e-2).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(("cls", "decays"), [(torch.optim.AdamW, (0.1, 0.02)), (composer.DecoupledAdamW, SMALL)])
def test_state_saved_under_onecyclelr_continues_as_theirs(cls: type, decays: tuple[float, float]) -> None:
    """OneCycleLR writes initial_lr and max_lr into their groups: Composer's decay refers to that initial_lr, torch's to neither."""
    theirs = start()
    optimizer = cls(two_groups(theirs, decays))
    scheduler = OneCycleLR(optimizer, max_lr=[1e-2, 3e-3], total_steps=STEPS + 1, cycle_momentum=False)
    for step in range(SAVED):
        set_grads(theirs, step)
        optimizer.step()
        scheduler.step()
    ours = copied(theirs)
    taken = our_adamw([{"params": ours[::2]}, {"params": ours[1::2]}])
    taken.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(SAVED, STEPS):
        set_grads(theirs, step)
        set_grads(ours, step)
        optimizer.step()
        taken.step()
        scheduler.step()
        for group, other in zip(taken.param_groups, optimizer.param_groups, strict=True):
            group["lr"] = other["lr"]
    assert relative_error(ours, theirs) <= AFTER_20_STEPS


# ------------------------------------------------------------------------------------------------------------------------ optimi

LOW_PRECISION = [
    Case(name="optimi.Adam", theirs=lambda g: optimi.Adam(g, 1e-2, **PLAIN), ours=our_adam, decays=(0.0, 0.0)),
    Case(name="optimi.AdamW", theirs=lambda g: optimi.AdamW(g, 1e-2, **PLAIN), ours=our_adamw, decays=(0.0, 0.0)),
    Case(name="optimi.StableAdamW", theirs=lambda g: optimi.StableAdamW(g, 1e-2, **PLAIN), ours=our_stable, decays=(0.0, 0.0), empty=False),
]


def kahan_values(each: Saved) -> list[Tensor]:
    """What bf16 parameters and their compensations add up to."""
    return [p.detach().double() + each.optimizer.state[p]["kahan_comp"].double() for p in each.params]


@pytest.mark.parametrize("case", LOW_PRECISION, ids=lambda case: case.name)
def test_bf16_trajectory_continues_with_its_kahan_compensation(case: Case) -> None:
    """No weight decay: optimi's does nothing to bf16 parameters (`test_peers_bugs.py`)."""
    theirs = train_theirs(case, torch.bfloat16)
    ours = taken_over(case, theirs, copy.deepcopy(theirs.optimizer.state_dict()))
    for mine, other in zip(ours.params, theirs.params, strict=True):
        assert_same(ours.optimizer.state[mine]["kahan_comp"], theirs.optimizer.state[other]["kahan_comp"])
        assert ours.optimizer.state[mine]["exp_avg"].dtype == torch.float32
    before = kahan_values(theirs)
    for each in (ours, theirs):
        train(each.params, each.optimizer, each.scheduler, range(SAVED, STEPS))
    # optimi rounds its moments to bf16 in every step, ours stay fp32. A rounding is at most 2**-9 of the value, 0.2%. m forgets 10% a
    # step and carries about 1 / sqrt(1 - 0.81) = 2.3 independent ones, v forgets 1% and carries those of 30 steps, 5.5, of which the root
    # takes half, and StableAdamW's clipping adds a few: an update is off by 1%, at most. A tensor of one element has no others to average
    # with, and its updates cancel on the way: 4%. Moments without their bias correction, or with one too many, are off by 60% and more.
    for mine, other, begin in zip(kahan_values(ours), kahan_values(theirs), before, strict=True):
        if other.numel():
            assert (other - begin).norm() > 0
            assert (mine - other).norm() <= 0.04 * (other - begin).norm()


@pytest.mark.parametrize("cls", [optimi.Adam, optimi.AdamW, optimi.StableAdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("placeholder", [None, torch.zeros(1, dtype=torch.uint8)], ids=["None", "uint8"])
def test_optimis_placeholders_for_a_kahan_compensation_are_not_loaded(cls: type, dtype: torch.dtype, placeholder: Tensor | None) -> None:
    """Where nothing is compensated optimi stores None, or one byte for its Triton kernels."""
    shapes = [shape for shape in SHAPES if 0 not in shape]
    theirs = start(dtype, shapes)
    optimizer = cls(theirs, lr=1e-2, kahan_sum=False, **PLAIN)
    set_grads(theirs, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        assert state["kahan_comp"] is None, "it is optimi's own placeholder"
        state["kahan_comp"] = placeholder
        state["mean_square"] = torch.zeros(1)
    ours = copied(theirs)
    taken = getattr(so, cls.__name__)(ours, lr=0.5, kahan_sum=True)
    taken.load_state_dict(saved)
    assert taken.param_groups[0]["kahan_sum"] is False
    for param in ours:
        assert set(taken.state[param]) == {"step", "exp_avg", "exp_avg_sq"}
    set_grads(ours, 1)
    set_grads(theirs, 1)
    taken.step()
    optimizer.step()
    # bf16: each rounds the parameter once, optimi from moments that it has rounded; the results may be neighbours, 2**-7 apart at most
    assert relative_error(ours, theirs) <= (AFTER_20_STEPS if dtype == torch.float32 else 2**-7)


def release_step(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, step: int) -> None:
    """As in backward: each parameter alone, and the last one in every other step only."""
    set_grads(params, step)
    for param in params[: len(params) if step % 2 else -1]:
        optimizer.step(param=param)


@pytest.mark.parametrize(("theirs", "ours"), [(optimi.Adam, our_adam), (optimi.AdamW, our_adamw), (optimi.StableAdamW, our_stable)])
def test_optimis_gradient_release_state_continues_with_a_step_per_parameter(theirs: type, ours: Callable, tmp_path) -> None:
    """There each parameter's state holds its own step counter and, under 'group', its whole param group with the parameters in it."""
    shapes = [shape for shape in SHAPES if 0 not in shape and shape]  # optimi's takes no scalar
    params = start(shapes=shapes)
    optimizer = theirs(params, lr=1e-2, weight_decay=0.1, gradient_release=True, **PLAIN)
    for step in range(SAVED):
        release_step(params, optimizer, step)
    torch.save(optimizer.state_dict(), tmp_path / "theirs.pt")
    for saved in (copy.deepcopy(optimizer.state_dict()), torch.load(tmp_path / "theirs.pt")):
        assert {"step", "group"} <= saved["state"][0].keys()
        mine = copied(params)
        taken = ours(mine)
        taken.load_state_dict(saved)
        assert [float(taken.state[param]["step"]) for param in mine] == [SAVED] * (len(shapes) - 1) + [SAVED / 2]
        assert all("group" not in taken.state[param] for param in mine)
        continued = copied(params)
        other = theirs(continued, lr=1e-2, weight_decay=0.1, gradient_release=True, **PLAIN)
        for old, new in zip(params, continued, strict=True):
            other.state[new].update({key: copy.deepcopy(value) for key, value in optimizer.state[old].items() if key != "group"})
        for step in range(SAVED, STEPS):
            release_step(continued, other, step)
            release_step(mine, taken, step)
        assert relative_error(mine, continued) <= AFTER_20_STEPS


def test_an_optimi_optimizer_that_has_not_stepped_hands_over_its_hyperparameters() -> None:
    theirs, ours = start(), start()
    taken = our_adamw(ours)
    taken.load_state_dict(optimi.AdamW(theirs, lr=1e-2, betas=(0.8, 0.95), weight_decay=0.2, eps=1e-5, **PLAIN).state_dict())
    group = taken.param_groups[0]
    assert {key: group[key] for key in ("lr", "betas", "weight_decay", "eps", "decay_form")} == {
        "lr": 1e-2,
        "betas": (0.8, 0.95),
        "weight_decay": 0.2,
        "eps": 1e-5,
        "decay_form": "coupled",
    }
    assert group["kahan_sum"] is True, "optimi's None: compensate where the dtype is low"
    assert not any(taken.state[param]["step"] for param in ours)


def test_optimis_kahan_sum_takes_the_place_of_our_stochastic_rounding() -> None:
    """And a placeholder where a compensation belongs begins at zero."""
    theirs = [nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    optimizer = optimi.AdamW(theirs, lr=1e-2, **PLAIN)
    set_grads(theirs, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for compensation in (saved["state"][0]["kahan_comp"], torch.ones(1, dtype=torch.uint8), None):
        saved["state"][0]["kahan_comp"] = compensation
        param = copied(theirs)[0]
        taken = so.AdamW([param], lr=0.5, stochastic_rounding=True)
        taken.load_state_dict(saved)
        assert (taken.param_groups[0]["kahan_sum"], taken.param_groups[0]["stochastic_rounding"]) == (True, False)
        real = compensation is not None and compensation.dtype == torch.bfloat16
        assert_same(taken.state[param]["kahan_comp"], compensation if real else torch.zeros(3, dtype=torch.bfloat16))


@pytest.mark.parametrize("theirs", [composer.DecoupledAdamW, lambda p, **o: optimi.AdamW(p, decouple_lr=True, **o, **PLAIN)])
def test_the_loaded_reference_lr_is_kept_by_an_optimizer_that_would_have_learned_its_own(theirs: Callable) -> None:
    """Ours built with lr=0 takes the largest lr so far for the reference, until it is told one; theirs may go above it."""
    params = [nn.Parameter(torch.ones(3))]
    optimizer = theirs(params, lr=1e-2, weight_decay=5e-4)
    set_grads(params, 0)
    optimizer.step()
    param = nn.Parameter(torch.ones(3))
    taken = so.DecoupledAdamW([param], lr=0.0)
    taken.load_state_dict(optimizer.state_dict())
    taken.state[param]["exp_avg"].zero_()
    taken.param_groups[0]["lr"] = 4e-2
    param.grad = torch.zeros(3)
    taken.step()
    torch.testing.assert_close(param.detach(), torch.full((3,), 1.0 - 4 * 5e-4), rtol=0, atol=1e-7)


# --------------------------------------------------------------------------------------------------------------- another family


def stepped(cls: Callable, **options: Any) -> torch.optim.Optimizer:
    params = start()
    optimizer = cls(params, **options)
    set_grads(params, 0)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("theirs", "ours", "lacks"),
    [
        (lambda: stepped(torch.optim.SGD, lr=1e-2, momentum=0.9), our_adamw, "exp_avg"),
        (lambda: stepped(torch.optim.SGD, lr=1e-2, momentum=0.9), our_adam, "exp_avg"),
        (lambda: stepped(composer.DecoupledSGDW, lr=1e-2, momentum=0.9), our_decoupled, "exp_avg"),
        (lambda: stepped(composer.DecoupledSGDW, lr=1e-2), our_stable, "exp_avg"),
        (lambda: stepped(torch.optim.AdamW, lr=1e-2), our_sgdw, "momentum_buffer"),
        (lambda: stepped(composer.DecoupledAdamW, lr=1e-2), our_sgdw, "momentum_buffer"),
        (lambda: stepped(optimi.AdamW, lr=1e-2, **PLAIN), our_sgdw, "momentum_buffer"),
        (lambda: stepped(torch.optim.AdamW, lr=1e-2), lambda g: so.DecoupledSGDW(g, 0.5, momentum=0.9), "momentum_buffer"),
    ],
    ids=[
        "torch.SGD-AdamW",
        "torch.SGD-Adam",
        "composer.DecoupledSGDW-DecoupledAdamW",
        "composer.DecoupledSGDW-without-momentum-StableAdamW",
        "torch.AdamW-DecoupledSGDW",
        "composer.DecoupledAdamW-DecoupledSGDW",
        "optimi.AdamW-DecoupledSGDW",
        "torch.AdamW-DecoupledSGDW-undampened",
    ],
)
def test_state_of_another_family_is_refused_and_changes_nothing(theirs: Callable, ours: Callable, lacks: str) -> None:
    """The error names what the state lacks."""
    params = start()
    optimizer = ours(params)
    set_grads(params, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"lacks '{lacks}'"):
        optimizer.load_state_dict(copy.deepcopy(theirs().state_dict()))
    assert_same(optimizer.state_dict(), before)


@pytest.mark.parametrize("name", ["Adan", "Ranger", "SGD"])
def test_state_of_optimis_other_optimizers_is_refused(name: str) -> None:
    """Adan's and Ranger's has all of AdamW's entries, and would continue as another algorithm."""
    params = start()
    theirs = getattr(optimi, name)(params, lr=1e-3, **PLAIN)
    set_grads(params, 0)
    theirs.step()
    for ours in (our_adamw, our_stable, our_sgdw):
        with pytest.raises(ValueError, match="from an optimizer of optimi that is not continued here"):
            ours(params).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("bias_correction", [True, False])
def test_state_of_deepspeeds_adam_without_bias_correction_is_refused(bias_correction: bool) -> None:
    """Its groups have the option; without it, training went on with other losses, by up to 24 % in 10 steps."""
    params = start()
    optimizer = our_adamw(params)
    group = {"lr": 1e-3, "bias_correction": bias_correction, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "step": 0}
    moments = ("exp_avg", "exp_avg_sq")
    saved = {
        "state": {index: {key: torch.ones_like(param) for key in moments} | {"step": 7} for index, param in enumerate(params)},
        "param_groups": [group | {"params": list(range(len(params)))}],
    }
    if bias_correction:
        optimizer.load_state_dict(saved)
        assert all(state["step"] == 7 for state in optimizer.state.values())
        return
    with pytest.raises(ValueError, match="bias_correction=False, an option of DeepSpeed's Adam"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == OTHER["lr"]


def test_l2_decay_is_refused_by_an_algorithm_that_has_none() -> None:
    params = start()
    optimizer = our_stable(params)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"decay_form='l2' is not supported by StableAdamW.*the state dict's param_groups\[0\]"):
        optimizer.load_state_dict(stepped(torch.optim.Adam, lr=1e-2, weight_decay=0.1).state_dict())
    assert_same(optimizer.state_dict(), before)


# -------------------------------------------------------------------------------------------------------------------- our own

OURS = [our_adam, our_adam_l2, our_adamw, our_decoupled, our_stable, our_sgdw]


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("scheduled", [False, True], ids=["", "OneCycleLR"])
def test_our_own_state_dict_is_not_translated(ours: Callable, scheduled: bool) -> None:
    """Also with the keys that OneCycleLR leaves in our groups, of which Composer's groups have `initial_lr` and optimi's `max_lr`."""
    params = start()
    optimizer = ours(two_groups(params, SMALL))
    scheduler = OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS) if scheduled else None
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    saved = optimizer.state_dict()
    assert not scheduled or {"initial_lr", "max_lr", "min_lr"} <= saved["param_groups"][0].keys()
    translated = foreign_state.translate(saved, optimizer.param_groups)
    assert_same(translated, saved)
    for group, given in zip(translated["param_groups"], saved["param_groups"], strict=True):
        assert group is given
    for key, state in saved["state"].items():
        assert translated["state"][key] is state


@pytest.mark.parametrize("ours", OURS)
def test_our_own_state_dict_saved_under_onecyclelr_continues_bitwise(ours: Callable) -> None:
    """The reference of our decay is not OneCycleLR's initial_lr, max_lr / 25."""

    def make(params: list[nn.Parameter]) -> tuple[torch.optim.Optimizer, OneCycleLR]:
        optimizer = ours(two_groups(params, SMALL))
        return optimizer, OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS + 1)

    def continue_(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, scheduler: OneCycleLR, steps: range) -> None:
        for step in steps:
            set_grads(params, step)
            optimizer.step()
            scheduler.step()

    straight = start()
    optimizer, scheduler = make(straight)
    continue_(straight, optimizer, scheduler, range(SAVED))
    resumed = copied(straight)
    fresh, other = make(resumed)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    assert [group["reference_lr"] for group in fresh.param_groups] == [group["reference_lr"] for group in optimizer.param_groups]
    continue_(straight, optimizer, scheduler, range(SAVED, STEPS))
    continue_(resumed, fresh, other, range(SAVED, STEPS))
    assert_same([p.detach() for p in resumed], [p.detach() for p in straight])


def test_an_unknown_state_dict_is_not_translated() -> None:
    """Its groups may hold anything; what our state needs is checked afterwards."""
    params = start()
    foreign = {"state": {0: {"step": 3, "exp_avg": torch.ones(2), "other": "x"}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    translated = foreign_state.translate(foreign, our_adamw(params).param_groups)
    assert_same(translated, foreign)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_defaults_of_torch_do_not_round_step_counters(dtype: torch.dtype) -> None:
    """12345 is no bfloat16. Counters are tensors, numbers or in the group, as the libraries save them; none is made on another device."""
    params = [nn.Parameter(torch.ones(4))]
    groups = {
        "torch": {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "maximize": False, "foreach": None},
        "Composer": {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "initial_lr": 1e-3},
        "optimi": {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-6, "decouple_lr": False, "max_lr": None},
    }
    groups["optimi"] |= {"kahan_sum": False, "foreach": False, "triton": False, "gradient_release": False, "setup": True}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            for library, group in groups.items():
                for step in (12345, 12345.0, torch.tensor(12345.0, dtype=torch.float32, device="cpu")):
                    moments = {key: torch.ones(4, dtype=torch.float32, device="cpu") for key in ("exp_avg", "exp_avg_sq")}
                    own = {} if library == "optimi" else {"step": step}
                    common = {"step": torch.as_tensor(step, dtype=torch.float32, device="cpu")} if library == "optimi" else {}
                    saved = {"state": {0: moments | own}, "param_groups": [{"lr": 1e-3, "params": [0]} | group | common]}
                    optimizer = so.AdamW(params, lr=1e-3)
                    optimizer.load_state_dict(saved)
                    counter = optimizer.state[params[0]]["step"]
                    assert (counter.item(), counter.dtype, counter.device.type) == (12345.0, torch.float32, "cpu"), (library, step)
            param, grad, exp_avg, exp_avg_sq = (torch.ones(3, dtype=torch.float32, device="cpu") for _ in range(4))
            options = {"beta1": 0.9, "beta2": 0.999, "lr": 1e-3, "initial_lr": 1e-3, "weight_decay": 0.0, "eps": 1e-8}
            so.DecoupledAdamW.adamw([param], [grad], [exp_avg], [exp_avg_sq], [], [12345], amsgrad=False, **options)
    finally:
        torch.set_default_dtype(before)
    expected, moment, moment_sq = (torch.ones(3) for _ in range(3))
    so.DecoupledAdamW.adamw([expected], [torch.ones(3)], [moment], [moment_sq], [], [torch.tensor(12345.0)], amsgrad=False, **options)
    assert torch.equal(param, expected)
