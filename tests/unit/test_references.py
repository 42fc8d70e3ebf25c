"""The optimizers against independent implementations: torch, optimi, and float64 code written here from the papers.

Tolerances:
    2 ulp       fp32 after one step from the same state: the order of operations is torch's, libraries may contract or reorder
    2e-5        relative parameter error after 100 fp32 steps: rounding of about 100 steps, measured 1e-6
    2e-4        the same for bf16 with Kahan compensation, whose 16 bits round a step by up to 1e-5
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import composer_formulas
import optimi
import pytest
import torch
from torch import Tensor, nn
from variants import CPU_BACKENDS

import sharded_optim as so

SHAPES = [(), (1,), (5,), (7, 3), (33, 17), (4096,), (0,)]
STEPS = 100
AFTER_100_STEPS = {torch.float32: 2e-5, torch.bfloat16: 2e-4}

pytestmark = pytest.mark.filterwarnings("ignore:weight_decay", "ignore:.*potentially high")


def start(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def grads_at(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    spike = 300.0 if step % 11 == 5 else 1.0
    return [torch.randn(shape, generator=generator) * spike for shape in SHAPES]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    for param, grad in zip(params, grads_at(step), strict=True):
        param.grad = grad.to(param.dtype)


def schedule(step: int) -> float:
    """Warm-up over 10 steps, then a half cosine."""
    return (step + 1) / 10 if step < 10 else 0.5 * (1 + math.cos(math.pi * (step - 10) / STEPS))


def train(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for step in range(STEPS):
        set_grads(params, step)
        optimizer.step()
        scheduler.step()


def relative_error(actual: list[nn.Parameter], expected: list[Tensor] | list[nn.Parameter]) -> float:
    pairs = [(a.detach().double(), e.detach().double()) for a, e in zip(actual, expected, strict=True) if a.numel()]
    return float(max((a - e).norm() / e.norm() for a, e in pairs))


def ulps(actual: Tensor, expected: Tensor, scale: Tensor) -> float:
    """Largest difference in units in the last place of `scale`."""
    unit = torch.nextafter(scale.abs(), torch.tensor(math.inf)) - scale.abs()
    return float(((actual.double() - expected.double()).abs() / unit.double()).max())


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.95, 0.95), (0.5, 0.9), (0.3, 0.99), (0.0, 0.99), (0.0, 0.0)])
def test_adamw_is_within_2_ulp_of_torch_per_step(betas: tuple[float, float]) -> None:
    """Each step from torch's state; in ulp of the largest of the parameter before, after, and the bound of an update."""
    lr = 1e-2
    bound = lr * max(1.0, (1 - betas[0]) / math.sqrt(1 - betas[1]))  # Kingma & Ba 2015, section 2.1
    ours, theirs = start(), start()
    optimizer = so.AdamW(ours, lr=lr, betas=betas, eps=1e-8, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs, lr=lr, betas=betas, eps=1e-8, weight_decay=0.1)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(each, schedule) for each in (optimizer, reference)]
    for step in range(STEPS):
        before = [param.detach().clone() for param in theirs]
        with torch.no_grad():
            for a, e in zip(ours, theirs, strict=True):
                a.copy_(e)
                for key in ("exp_avg", "exp_avg_sq", "step") if step else ():
                    optimizer.state[a][key].copy_(reference.state[e][key])
        for params, each, scheduler in ((ours, optimizer, schedulers[0]), (theirs, reference, schedulers[1])):
            set_grads(params, step)
            each.step()
            scheduler.step()
        for a, e, b in zip(ours, theirs, before, strict=True):
            if not a.numel():
                continue
            mine, state = optimizer.state[a], reference.state[e]
            assert ulps(a.detach(), e.detach(), torch.maximum(b.abs(), e.detach().abs()).clamp(min=bound)) <= 2.0
            assert ulps(mine["exp_avg"], state["exp_avg"], torch.maximum(state["exp_avg"].abs(), a.grad.abs())) <= 2.0
            assert ulps(mine["exp_avg_sq"], state["exp_avg_sq"], state["exp_avg_sq"]) <= 2.0


def stable_adamw_formula(params: list[Tensor], *, lr: float, betas, eps: float, weight_decay: float, decay: str = "coupled") -> list[float]:
    """Algorithm 2 of arXiv 2304.13013 in float64, with debiased betas as the paper writes them. Returns the last step's RMS values."""
    beta1, beta2 = betas
    first, second = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    rms_values: list[float] = []
    for step in range(STEPS):
        lr_now, t = lr * schedule(step), step + 1
        rms_values = []
        for p, g, v, u in zip(params, (grad.double() for grad in grads_at(step)), first, second, strict=True):
            beta1_hat = beta1 * (1 - beta1 ** (t - 1)) / (1 - beta1**t)
            beta2_hat = beta2 * (1 - beta2 ** (t - 1)) / (1 - beta2**t)
            v.mul_(beta1_hat).add_((1 - beta1_hat) * g)
            u.mul_(beta2_hat).add_((1 - beta2_hat) * g * g)
            rms = float((g * g / u.clamp(min=eps * eps)).mean().sqrt()) if p.numel() else 0.0
            eta = lr_now / max(1.0, rms)
            amount = {"coupled": eta, "decoupled": eta / lr, "corrected": eta * lr_now / lr}[decay] * weight_decay
            p.mul_(1 - amount)
            p.sub_(eta * v / (u.sqrt() + eps))
            rms_values.append(rms)
    return rms_values


@pytest.mark.parametrize("decay", ["coupled", "decoupled", "corrected"])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.999)])
def test_stable_adamw_follows_the_paper_in_float64(betas: tuple[float, float], decay: str) -> None:
    """Parameters, and the statistic to 1e-6, over 100 steps of which some have 300 times larger gradients."""
    options = {"lr": 1e-2, "betas": betas, "eps": 1e-6, "weight_decay": 0.1 if decay != "decoupled" else 1e-3}
    ours, expected = start(), [p.detach().double() for p in start()]
    optimizer = so.StableAdamW([(str(i), p) for i, p in enumerate(ours)], decay_form=decay, **options)
    train(ours, optimizer)
    rms_values = stable_adamw_formula(expected, decay=decay, **options)
    assert relative_error(ours, expected) < AFTER_100_STEPS[torch.float32]
    metrics = optimizer.metrics()
    assert "rms/6" not in metrics, "a tensor without elements has no statistic"
    for index, rms in enumerate(rms_values[:6]):
        assert metrics[f"rms/{index}"] == pytest.approx(rms, rel=1e-6)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One of our optimizers, and an independent one that computes in float64."""

    ours: Callable[..., torch.optim.Optimizer]
    theirs: Callable[..., torch.optim.Optimizer]


LOOP = {"foreach": False, "triton": False}
CASES = {
    "Adam of optimi": Case(
        ours=lambda p, **options: so.Adam(p, lr=1e-2, **options),
        theirs=lambda p: optimi.Adam(p, lr=1e-2, **LOOP),
    ),
    "Adam of optimi, L2": Case(
        ours=lambda p, **options: so.Adam(p, 1e-2, (0.95, 0.98), 0.1, 1e-7, **options),
        theirs=lambda p: optimi.Adam(p, 1e-2, (0.95, 0.98), 0.1, 1e-7, **LOOP),
    ),
    "Adam of optimi, decouple_wd": Case(
        ours=lambda p, **options: so.Adam(p, lr=1e-2, weight_decay=0.1, decouple_wd=True, **options),
        theirs=lambda p: optimi.Adam(p, lr=1e-2, weight_decay=0.1, decouple_wd=True, **LOOP),
    ),
    "Adam of optimi, decouple_lr": Case(
        ours=lambda p, **options: so.Adam(p, 1e-2, (0.9, 0.99), 5e-4, 1e-6, True, True, 2e-2, **options),
        theirs=lambda p: optimi.Adam(p, 1e-2, (0.9, 0.99), 5e-4, 1e-6, True, True, 2e-2, **LOOP),
    ),
    "Adam of torch, L2": Case(
        ours=lambda p, **options: so.Adam(p, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, **options),
        theirs=lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1),
    ),
    "AdamW of optimi": Case(
        ours=lambda p, **options: so.AdamW(p, lr=1e-2, **options),
        theirs=lambda p: optimi.AdamW(p, lr=1e-2, **LOOP),
    ),
    "AdamW of optimi, decouple_lr": Case(
        ours=lambda p, **options: so.AdamW(p, lr=1e-2, weight_decay=5e-4, decouple_lr=True, **options),
        theirs=lambda p: optimi.AdamW(p, lr=1e-2, weight_decay=5e-4, decouple_lr=True, **LOOP),
    ),
    "AdamW of torch": Case(
        ours=lambda p, **options: so.AdamW(p, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, **options),
        theirs=lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1),
    ),
    "AdamW of torch, amsgrad": Case(
        ours=lambda p, **options: so.AdamW([{"params": p, "amsgrad": True}], lr=1e-2, eps=1e-8, **options),
        theirs=lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, amsgrad=True),
    ),
    "StableAdamW of optimi": Case(
        ours=lambda p, **options: so.StableAdamW(p, lr=1e-2, **options),
        theirs=lambda p: optimi.StableAdamW(p, lr=1e-2, **LOOP),
    ),
    "StableAdamW of optimi, decouple_lr": Case(
        ours=lambda p, **options: so.StableAdamW(p, 1e-2, (0.9, 0.95), 5e-4, 1e-7, True, 2e-2, **options),
        theirs=lambda p: optimi.StableAdamW(p, 1e-2, (0.9, 0.95), 5e-4, 1e-7, True, 2e-2, **LOOP),
    ),
    "DecoupledAdamW of Composer": Case(
        ours=lambda p, **options: so.DecoupledAdamW(p, **options),
        theirs=lambda p: composer_formulas.DecoupledAdamW(p),
    ),
    "DecoupledAdamW of Composer, amsgrad": Case(
        ours=lambda p, **options: so.DecoupledAdamW(p, 1e-2, (0.8, 0.9), 1e-7, 1e-3, True, **options),
        theirs=lambda p: composer_formulas.DecoupledAdamW(p, 1e-2, (0.8, 0.9), 1e-7, 1e-3, True),
    ),
    "DecoupledSGDW of Composer": Case(
        ours=lambda p, **options: so.DecoupledSGDW(p, 1e-4, weight_decay=1e-3, **options),
        theirs=lambda p: composer_formulas.DecoupledSGDW(p, 1e-4, weight_decay=1e-3),
    ),
    "DecoupledSGDW of Composer, dampening": Case(
        ours=lambda p, **options: so.DecoupledSGDW(p, 1e-4, 0.9, 0.3, 1e-3, **options),
        theirs=lambda p: composer_formulas.DecoupledSGDW(p, 1e-4, 0.9, 0.3, 1e-3),
    ),
    "DecoupledSGDW of Composer, nesterov": Case(
        ours=lambda p, **options: so.DecoupledSGDW(p, 1e-4, 0.9, 0.0, 1e-3, True, **options),
        theirs=lambda p: composer_formulas.DecoupledSGDW(p, 1e-4, 0.9, 0.0, 1e-3, True),
    ),
    "SGD of torch": Case(
        ours=lambda p, **options: so.DecoupledSGDW(p, lr=1e-4, momentum=0.9, nesterov=True, **options),
        theirs=lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, nesterov=True),
    ),
}
SCHEDULERS = {
    "constant": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1.0),
    "warm-up and cosine": lambda o: torch.optim.lr_scheduler.LambdaLR(o, schedule),
    "steps": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, milestones=[30, 60], gamma=0.3),
}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", AFTER_100_STEPS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_trajectory_equals_an_independent_one_in_float64(case: str, dtype: torch.dtype, backend: str, everything: bool) -> None:
    """100 steps, of which some have 300 times larger gradients; low precision keeps what it rounds away (Kahan).

    The dtypes and backends of a case share the schedulers out, unless everything is asked for.
    """
    turn = list(CASES).index(case) + list(AFTER_100_STEPS).index(dtype) + CPU_BACKENDS.index(backend)
    for scheduler in SCHEDULERS if everything else [list(SCHEDULERS)[turn % len(SCHEDULERS)]]:
        check_trajectory(case, scheduler, dtype, backend)


def check_trajectory(case: str, scheduler: str, dtype: torch.dtype, backend: str) -> None:
    ours, theirs = start(dtype), [nn.Parameter(p.detach().double()) for p in start(dtype) if p.numel()]
    optimizer = CASES[case].ours(ours, backend=backend)
    reference = CASES[case].theirs(theirs)
    schedulers = [SCHEDULERS[scheduler](each) for each in (optimizer, reference)]
    for step in range(STEPS):
        set_grads(ours, step)
        for a, e in zip([p for p in ours if p.numel()], theirs, strict=True):
            e.grad = a.grad.double()
        for each in (optimizer, reference, *schedulers):
            each.step()
    values = [p.detach().double() + optimizer.state[p]["kahan_comp"] if "kahan_comp" in optimizer.state[p] else p for p in ours]
    assert relative_error([value for value in values if value.numel()], theirs) < AFTER_100_STEPS[dtype], scheduler


@pytest.mark.parametrize("name", ["Adam", "AdamW", "StableAdamW"])
def test_optimis_arguments_have_its_order_and_defaults(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(library, name)).parameters for library in (so, optimi))
    assert list(ours)[: len(theirs)] == list(theirs)
    assert ours["lr"].default == 1e-3  # which some of theirs demand
    assert [ours[key].default for key in theirs if key != "lr"] == [theirs[key].default for key in theirs if key != "lr"]
    assert all(parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD) for parameter in list(ours.values())[len(theirs) :])


@pytest.mark.parametrize("name", ["DecoupledAdamW", "DecoupledSGDW"])
def test_composers_arguments_have_its_order_and_defaults(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(library, name)).parameters for library in (so, composer_formulas))
    assert list(ours)[: len(theirs)] == list(theirs)
    assert ours["lr"].default == 1e-3  # which some of theirs demand
    assert [ours[key].default for key in theirs if key != "lr"] == [theirs[key].default for key in theirs if key != "lr"]
    assert all(parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD) for parameter in list(ours.values())[len(theirs) :])


@pytest.mark.parametrize("size", [1e-8, 1e-6, 1e-4])
def test_stable_adamw_with_gradients_around_eps_follows_float64(size: float) -> None:
    """There eps^2 bounds the second moment in the statistic from below."""
    param = nn.Parameter(torch.zeros(64))
    expected = torch.zeros(64, dtype=torch.float64)
    optimizer = so.StableAdamW([("w", param)], lr=1e-2, eps=1e-6, weight_decay=0.0)
    m, v = torch.zeros(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
    for t in range(1, 6):
        param.grad = torch.randn(64, generator=torch.Generator().manual_seed(t)) * size * 10 ** (t % 3)
        g = param.grad.double()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        debiased = v / (1 - 0.99**t)
        rms = float((g * g / debiased.clamp(min=1e-12)).mean().sqrt())
        expected -= 1e-2 / max(1.0, rms) * (m / (1 - 0.9**t)) / (debiased.sqrt() + 1e-6)
        assert optimizer.metrics()["rms/w"] == pytest.approx(rms, rel=1e-6)
    assert relative_error([param], [expected]) < AFTER_100_STEPS[torch.float32]


def test_fp16_parameters_follow_fp32_within_their_own_rounding() -> None:
    exact, rounded = nn.Parameter(torch.linspace(-2, 2, 33)), nn.Parameter(torch.linspace(-2, 2, 33).half())
    for param in (exact, rounded):
        optimizer = so.StableAdamW([param], lr=1e-2)
        for step in range(5):
            param.grad = torch.linspace(-1, 1 + step, 33).to(param.dtype)
            optimizer.step()
    assert rounded.dtype == torch.float16
    torch.testing.assert_close(rounded.float(), exact, rtol=5 * 2**-11, atol=5 * 2**-11)


def test_bf16_parameters_follow_float64_within_their_own_rounding() -> None:
    """One step from bf16 values, with fp32 moments, is the float64 step rounded once."""
    ours = start(torch.bfloat16)
    expected = [p.detach().double() for p in ours]
    optimizer = so.StableAdamW(ours, lr=0.1)
    set_grads(ours, 5)
    optimizer.step()
    for p, theta in zip(ours, expected, strict=True):
        g = p.grad.double()
        if not p.numel():
            continue
        rms = float((g * g / (g * g).clamp(min=1e-12)).mean().sqrt())
        eta = 0.1 / max(1.0, rms)
        theta.mul_(1 - eta * 1e-2).sub_(eta * g / (g.abs() + 1e-6))
        wrong = (p.detach() != theta.float().to(torch.bfloat16)).double().mean()
        assert wrong < 0.01, "more than the rare tie differs"
        assert torch.allclose(p.detach().double(), theta, rtol=2**-8, atol=0)
