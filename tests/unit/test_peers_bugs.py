"""Bugs of Composer 0.31 and optimi 0.3.3 that ours does not have. Each test tells one; "measured" means seen by running theirs.

Those that need several ranks (Composer's metrics under FSDP2 and HSDP) are tested with the sharded models.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import composer_formulas as composer
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import OneCycleLR

import sharded_optim as so

CLASSES = [so.Adam, so.AdamW, so.DecoupledAdamW, so.DecoupledSGDW, so.StableAdamW]
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
high_decay = pytest.mark.filterwarnings("ignore:weight_decay=.* is high")


def make_param(*values: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def step_with(optimizer: torch.optim.Optimizer, grad: Tensor, *params: nn.Parameter) -> None:
    for param in params:
        param.grad = grad.to(param.dtype).expand(param.shape).clone()
    optimizer.step()


def decay_of_one_step(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> float:
    """Fraction by which a step with zero gradient shrinks a parameter of ones."""
    with torch.no_grad():
        param.fill_(1.0)
    step_with(optimizer, torch.tensor(0.0), param)
    return 1.0 - float(param.detach().reshape(-1)[0])


def reported(optimizer: Any, param: nn.Parameter) -> dict[str, float]:
    """{kind: value} of a parameter called w, by the three calls of Composer's OptimizerMonitor."""
    metrics = optimizer.report_per_parameter_metrics(param, "w", {})
    metrics = optimizer.dist_reduce_metrics(optimizer.pre_reduce_metrics(metrics))
    return {key.removesuffix("/w"): float(value) for key, value in metrics.items()}


# ---------------------------------------------------------------------------------------------------------------------- Composer


@high_decay
def test_the_update_metric_is_what_the_step_subtracted() -> None:
    """Composer computes it after the step, from the parameter that the step has left, and with the sign of the decay turned around.

    Measured: the true norm was 0.0529, it reported 0.0343.
    """
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(17, generator=generator))
    optimizer = so.DecoupledAdamW([param], lr=1e-2, weight_decay=1e-2)
    for _ in range(3):
        before = param.detach().double()
        step_with(optimizer, torch.randn(17, generator=generator), param)
    after = param.detach().double()
    values = reported(optimizer, param)
    assert values["l2_norm/update"] == pytest.approx(float((before - after).norm()), rel=1e-5)
    adam = before - after - 1e-2 * before
    composers = adam - 1e-2 * after
    assert abs(float(composers.norm()) / values["l2_norm/update"] - 1) > 0.1, "here the two formulas hardly differ"
    cosine = float((before - after) @ param.grad.double() / (before - after).norm() / param.grad.double().norm())
    assert values["cosine/update_grad"] == pytest.approx(cosine, rel=1e-4)


def test_the_update_metric_uses_the_parameters_own_group() -> None:
    """Composer takes the hyperparameters of param_groups[0] for every parameter.

    Measured: a parameter of a second group, with an lr of 1e-4 instead of 1e-2, moved by 2e-4, and it reported 2e-2.
    """
    fast, slow = make_param(1.0, 2.0, 3.0, 4.0), make_param(1.0, 2.0, 3.0, 4.0)
    optimizer = so.DecoupledAdamW([{"params": [fast]}, {"params": [slow], "lr": 1e-4}], lr=1e-2, weight_decay=0.0)
    step_with(optimizer, torch.tensor([1.0, -1.0, 1.0, -1.0]), fast, slow)
    assert reported(optimizer, fast)["l2_norm/update"] == pytest.approx(2e-2, rel=1e-3)
    assert reported(optimizer, slow)["l2_norm/update"] == pytest.approx(2e-4, rel=1e-3)


@every_class
def test_metrics_are_reduced_on_a_cpu_without_a_process_group(cls: type) -> None:
    """Composer's crashes on a CPU (measured)."""
    param = make_param(3.0, 4.0)
    optimizer = cls([param], lr=1e-2)
    step_with(optimizer, torch.tensor([1.0, -2.0]), param)
    before = optimizer.report_per_parameter_metrics(param, "w", {"loss": 1.0})
    after = optimizer.dist_reduce_metrics(optimizer.pre_reduce_metrics(dict(before)))
    assert after.pop("loss") == 1.0
    assert float(after["l2_norm/grad/w"]) == pytest.approx(math.sqrt(5))
    assert float(after["l2_norm/param/w"]) == pytest.approx(float(param.detach().norm()), rel=1e-6)
    for key, value in after.items():
        assert float(value) == pytest.approx(float(before[key]), rel=1e-12)


def test_the_update_metric_of_amsgrad_divides_by_the_largest_second_moment() -> None:
    """Composer's divides by the present one, whatever `amsgrad`: after a spike it reports an update several times too large."""
    param = make_param(1.0, 2.0, 3.0)
    optimizer = so.DecoupledAdamW([param], lr=1e-2, weight_decay=0.0, amsgrad=True)
    step_with(optimizer, torch.tensor(100.0), param)
    for _ in range(60):
        before = param.detach().double()
        step_with(optimizer, torch.tensor(1.0), param)
    moved = float((before - param.detach().double()).norm())
    state = optimizer.state[param]
    assert float((state["max_exp_avg_sq"] / state["exp_avg_sq"]).sqrt().min()) > 3, "the largest is hardly another"
    assert reported(optimizer, param)["l2_norm/update"] == pytest.approx(moved, rel=1e-3)


@pytest.mark.parametrize("cls", ["DecoupledAdamW", "DecoupledSGDW"])
@high_decay
def test_an_lr_of_0_at_construction_does_not_mean_full_decay_forever(cls: str) -> None:
    """A warm-up that writes lr=0 before the optimizer is built leaves Composer's initial_lr at 0, and its decay factor is then 1.

    Measured: every step decays by the whole weight_decay, also those at lr=0 and those at the end of the schedule.
    """
    ours, theirs = make_param(1.0), make_param(1.0)
    optimizer, reference = getattr(so, cls)([ours], lr=0.0, weight_decay=0.1), getattr(composer, cls)([theirs], lr=0.0, weight_decay=0.1)
    decays, composers = [], []
    for lr in (0.0, 0.5, 1.0, 0.5, 0.0):
        optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = lr
        decays.append(decay_of_one_step(optimizer, ours))
        composers.append(decay_of_one_step(reference, theirs))
    assert decays == pytest.approx([0.0, 0.1, 0.1, 0.05, 0.0], abs=1e-6)
    assert composers == pytest.approx([0.1] * 5, abs=1e-6)


@pytest.mark.parametrize("cls", ["DecoupledAdamW", "DecoupledSGDW"])
@high_decay
def test_a_param_group_added_later_steps(cls: str) -> None:
    """Composer writes initial_lr at construction alone: the first step after add_param_group is a KeyError (measured)."""
    early, ours, theirs = make_param(1.0), make_param(1.0), make_param(1.0)
    optimizer = getattr(so, cls)([early], lr=1e-2, weight_decay=0.1)
    optimizer.add_param_group({"params": [ours], "lr": 1e-3})
    assert decay_of_one_step(optimizer, ours) == pytest.approx(0.1, abs=1e-6)
    assert decay_of_one_step(optimizer, early) == pytest.approx(0.1, abs=1e-6)
    reference = getattr(composer, cls)([make_param(1.0)], lr=1e-2, weight_decay=0.1)
    reference.add_param_group({"params": [theirs]})
    with pytest.raises(KeyError, match="initial_lr"):
        decay_of_one_step(reference, theirs)


@pytest.mark.parametrize("cls", ["DecoupledAdamW", "DecoupledSGDW"])
def test_decay_under_onecyclelr_never_exceeds_weight_decay(cls: str) -> None:
    """OneCycleLR overwrites initial_lr with max_lr / 25, to which Composer's decay refers: at the peak it is 25 times weight_decay."""
    ours, theirs = make_param(1.0), make_param(1.0)
    largest = {}
    for name, library, param in (("ours", so, ours), ("composer", composer, theirs)):
        optimizer = getattr(library, cls)([param], lr=1e-2, weight_decay=5e-4, **({"momentum": 0.9} if cls == "DecoupledSGDW" else {}))
        scheduler = OneCycleLR(optimizer, max_lr=1e-2, total_steps=10)  # which reaches max_lr exactly
        decays = []
        for _ in range(9):
            decays.append(decay_of_one_step(optimizer, param))
            scheduler.step()
        largest[name] = max(decays)
    assert largest["ours"] == pytest.approx(5e-4, rel=1e-3)
    assert largest["composer"] == pytest.approx(25 * 5e-4, rel=1e-3)


@pytest.mark.parametrize("cls", ["DecoupledAdamW", "DecoupledSGDW"])
@high_decay
def test_a_tensor_lr_is_not_the_reference_of_its_own_decay(cls: str) -> None:
    """Composer's initial_lr is then the same tensor as lr. A scheduler fills it in place, so lr / initial_lr stays 1."""
    decays = []
    for library in (so, composer):
        param, lr = make_param(1.0), torch.tensor(1e-2)
        optimizer = getattr(library, cls)([param], lr=lr, weight_decay=0.1)
        lr.fill_(1e-3)
        decays.append(decay_of_one_step(optimizer, param))
    assert decays == pytest.approx([0.01, 0.1], abs=1e-6)


def assert_flat_checkpoint_continues(make: Callable[[Any], torch.optim.Optimizer], path: str) -> None:
    """get_optimizer_state_dict, flat -> dcp.save -> dcp.load -> set_optimizer_state_dict; then both step alike, bit for bit."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer, fresh = make(model.parameters()), make(twin.parameters())
    for step in range(3):
        step_with(optimizer, torch.tensor(1.0 + step), *model.parameters())
    twin.load_state_dict(model.state_dict())
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    assert saved
    assert None not in saved.values()
    dcp.save(saved, checkpoint_id=path)
    for group in fresh.param_groups:
        group["lr"] = 0.5
    loaded = get_optimizer_state_dict(twin, fresh, options=options)
    dcp.load(loaded, checkpoint_id=path)
    set_optimizer_state_dict(twin, fresh, loaded, options=options)
    assert fresh.param_groups[0]["lr"] == 1e-2
    for step in range(3, 6):
        for each, module in ((optimizer, model), (fresh, twin)):
            step_with(each, torch.tensor(1.0 + step), *module.parameters())
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_without_momentum_is_saved_in_a_flat_distributed_checkpoint(momentum: float, tmp_path) -> None:
    """Composer stores None as the buffer, which a flat checkpoint cannot write: saving fails (measured). Ours stores no buffer."""
    assert_flat_checkpoint_continues(lambda params: so.DecoupledSGDW(params, lr=1e-2, momentum=momentum), str(tmp_path))


# ------------------------------------------------------------------------------------------------------------------------ optimi


class FakeTriton(ModuleType):
    """Has whatever is asked of it, and can be found and imported."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, loader=None, is_package=True)
        self.__path__ = []
        self.__version__ = "3.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


@every_class
def test_a_cpu_steps_where_triton_is_installed(cls: type, monkeypatch) -> None:
    """optimi's StableAdamW chooses its backend before it has collected the parameters: all of none are on a GPU.

    Measured: with triton importable, the default backend crashes in the first step on a CPU.
    """
    for name in ("triton", "triton.language"):
        monkeypatch.setitem(sys.modules, name, FakeTriton(name))
    assert importlib.util.find_spec("triton") is not None
    with_triton, without = make_param(1.0, 2.0), make_param(1.0, 2.0)
    for param, options in ((with_triton, {}), (without, {"triton": False})):
        optimizer = cls([param], lr=1e-2, **options)
        step_with(optimizer, torch.tensor([1.0, -1.0]), param)
    assert torch.equal(with_triton, without)
    assert not torch.equal(with_triton.detach(), torch.tensor([1.0, 2.0]))


DECAYED = 0.999**1000  # 0.368


@pytest.mark.parametrize(
    "make",
    [
        lambda p: so.AdamW(p, lr=0.1, weight_decay=1e-2),
        lambda p: so.StableAdamW(p, lr=0.1, weight_decay=1e-2),
        lambda p: so.Adam(p, lr=0.1, weight_decay=1e-2, decouple_wd=True),
        lambda p: so.DecoupledAdamW(p, lr=0.1, weight_decay=1e-3),
        lambda p: so.DecoupledSGDW(p, lr=0.1, weight_decay=1e-3),
    ],
    ids=["AdamW", "StableAdamW", "Adam", "DecoupledAdamW", "DecoupledSGDW"],
)
@high_decay
def test_bf16_parameters_decay(make: Callable) -> None:
    """optimi multiplies the rounded parameter by 1 - lr * weight_decay, outside its Kahan sum: 1 - 1e-3 rounds back to 1 in bf16.

    Measured: 1000 steps at 1e-3 left 1.0 of a parameter of ones, where 0.999**1000 = 0.368 is right (OneTrainer#996).
    """
    param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = make([param])
    param.grad = torch.zeros_like(param)
    for _ in range(1000):
        optimizer.step()
    # The parameter is the value rounded to bf16, 2**-9 at most. The value, on two arrays, has 16 bits: 1000 roundings of 2**-17 that may
    # all fall on one side are 0.8%.
    assert param.detach().double().tolist() == pytest.approx([DECAYED] * 3, rel=0.01)


def test_bf16_parameters_decay_with_stochastic_rounding() -> None:
    """Without a second array each step falls by one bf16 number with the right probability: right on average, over 10,000 elements."""
    param = nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
    optimizer = so.AdamW([param], lr=0.1, weight_decay=1e-2, stochastic_rounding=True)
    param.grad = torch.zeros_like(param)
    for _ in range(200):
        optimizer.step()
    # A step's variance is at most (2**-8)**2 / 4; over 200 steps and 10,000 elements the mean is off by 3e-4 in one standard deviation.
    assert float(param.detach().double().mean()) == pytest.approx(0.999**200, abs=1.5e-3)


@pytest.mark.parametrize("cls", [so.Adam, so.AdamW, so.DecoupledAdamW, so.StableAdamW])
def test_a_parameter_whose_gradients_begin_late_takes_a_full_first_step(cls: type) -> None:
    """optimi counts steps per group, so the bias correction of a late parameter is that of an old one.

    Measured: its first step is 0.80 * lr where Adam's is lr.
    """
    early, late = make_param(1.0, 2.0), make_param(1.0, 2.0)
    optimizer = cls([early, late], lr=1e-2, weight_decay=0.0)
    for _ in range(5):
        step_with(optimizer, torch.tensor(1.0), early)
    step_with(optimizer, torch.tensor(1.0), early, late)
    torch.testing.assert_close(late.detach(), torch.tensor([0.99, 1.99]), rtol=0, atol=1e-6)
    assert (optimizer.state[early]["step"], optimizer.state[late]["step"]) == (6, 1)


@pytest.mark.parametrize("cls", [so.Adam, so.AdamW, so.StableAdamW])
@high_decay
def test_decouple_lr_with_an_lr_of_0_does_not_divide_by_0(cls: type) -> None:
    """optimi divides lr by max_lr, which is then 0: ZeroDivisionError in the first step (measured). Warm-ups begin so."""
    param = make_param(1.0)
    optimizer = cls([param], lr=0.0, weight_decay=0.1, decouple_lr=True)
    decays = [decay_of_one_step(optimizer, param)]
    optimizer.param_groups[0]["lr"] = 1e-3
    decays.append(decay_of_one_step(optimizer, param))
    assert decays == pytest.approx([0.0, 0.1], abs=1e-6)


@pytest.mark.parametrize("cls", [so.Adam, so.AdamW, so.StableAdamW])
@high_decay
def test_the_reference_of_the_decay_is_each_groups_own_lr(cls: type) -> None:
    """optimi's max_lr is the constructor's lr for all groups: one of ten times that lr decays ten times too much (measured)."""
    a, b, c = make_param(1.0), make_param(1.0), make_param(1.0)
    groups = [{"params": [a]}, {"params": [b], "lr": 1e-1}, {"params": [c], "lr": 1e-1, "max_lr": 2e-1}]
    optimizer = cls(groups, lr=1e-2, weight_decay=1e-2, decouple_lr=True)
    assert [decay_of_one_step(optimizer, p) for p in (a, b, c)] == pytest.approx([1e-2, 1e-2, 5e-3], abs=1e-6)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@every_class
def test_fp32_state_is_saved_in_a_flat_distributed_checkpoint(cls: type, tmp_path) -> None:
    """optimi stores kahan_comp=None for fp32 parameters, which a flat checkpoint cannot write: saving fails (measured)."""
    assert_flat_checkpoint_continues(lambda params: cls(params, lr=1e-2), str(tmp_path))


@pytest.mark.parametrize(
    "make",
    [*CLASSES, lambda p, lr: so.DecoupledSGDW(p, lr, momentum=0.5)],
    ids=[*(cls.__name__ for cls in CLASSES), "DecoupledSGDW-momentum"],
)
def test_onecyclelr_cycles_momentum_by_default(make: Callable) -> None:
    """optimi's defaults have beta1 and beta2 but neither betas nor momentum, so torch's OneCycleLR raises unless cycle_momentum=False."""
    param = make_param(1.0)
    optimizer = make([param], lr=1e-2)
    scheduler = OneCycleLR(optimizer, max_lr=1e-2, total_steps=10, base_momentum=0.7, max_momentum=0.9)
    momenta = []
    for _ in range(9):
        step_with(optimizer, torch.tensor(1.0), param)
        group = optimizer.param_groups[0]
        momenta.append(group["betas"][0] if "betas" in group else group["momentum"])
        scheduler.step()
    assert momenta[0] == pytest.approx(0.9)
    assert min(momenta) < 0.75
    assert bool(param.isfinite().all())


GRADIENT_KEEPERS = [
    lambda p, **options: so.Adam(p, lr=1e-2, weight_decay=0.1, **options),  # through the gradient
    *(lambda p, cls=cls, **options: cls(p, lr=1e-2, weight_decay=5e-4, **options) for cls in CLASSES[1:]),
]


@pytest.mark.parametrize("make", GRADIENT_KEEPERS, ids=[cls.__name__ for cls in CLASSES])
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_leaves_the_gradients_as_they_are(make: Callable, foreach: bool | None, dtype: torch.dtype) -> None:
    """optimi's foreach step uses p.grad as scratch, and its L2 decay and Kahan sums do in every step: who reads them later is wrong."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((), (5,), (7, 3), (0,))]
    grads = [torch.randn(param.shape, generator=generator).to(dtype) for param in params]
    optimizer = make(params, foreach=foreach)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    given = [param.grad for param in params]
    for _ in range(2):
        optimizer.step()
    for param, grad, each in zip(params, grads, given, strict=True):
        assert param.grad is each
        assert torch.equal(each, grad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_does_not_destroy_the_model_without_a_word(bad: float) -> None:
    """optimi writes NaN into parameters and moments, for good (measured). StableAdamW skips and counts the step; the others can raise."""
    param, other = make_param(1.0, 2.0), make_param(3.0)
    optimizer = so.StableAdamW([param, other], lr=1e-2)
    step_with(optimizer, torch.tensor(1.0), param, other)
    kept = [*optimizer.state[param].values(), *optimizer.state[other].values(), param.detach(), other.detach()]
    before = [each.clone() for each in kept]
    param.grad = torch.tensor([1.0, bad])
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))
    assert optimizer.skipped_steps == 1
    assert optimizer.metrics()["skipped_steps"] == 1.0
    step_with(optimizer, torch.tensor(1.0), param, other)
    assert bool(param.isfinite().all())
    assert optimizer.state[param]["step"] == 2


@every_class
def test_a_non_finite_gradient_raises_where_asked_to(cls: type) -> None:
    """optimi has no such option. The error names the tensor, and nothing is written."""
    param = make_param(1.0, 2.0)
    optimizer = cls([("head.weight", param)], lr=1e-2, nonfinite="raise")
    param.grad = torch.tensor([1.0, math.nan])
    with pytest.raises(FloatingPointError, match=r"head\.weight"):
        optimizer.step()
    assert torch.equal(param.detach(), torch.tensor([1.0, 2.0]))
