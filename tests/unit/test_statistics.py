"""The fixed-point sum is exact, and does not depend on where a tensor is cut."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from variants import examples

from sharded_optim.backends import Operands
from sharded_optim.backends.eager import BACKEND
from sharded_optim.formulas import Statistic
from sharded_optim.formulas.scalars import bias_correction
from sharded_optim.optimizers.stable_adamw import STABLE_ADAMW
from sharded_optim.step.statistics import FixedPoint, fraction_bits

STATISTIC = STABLE_ADAMW.statistic
assert STATISTIC is not None
IDENTITY = Statistic(observe=lambda grad: grad, coefficients=lambda *_: (), bound=lambda _: 10.0, lr_scale=lambda group, mean: mean)
GROUP = {"betas": (0.9, 0.99), "eps": 1e-6}


def observed(grad: torch.Tensor, exp_avg_sq: torch.Tensor, bits: int, step: int = 3) -> tuple[int, bool]:
    """Fixed-point sum of StableAdamW's statistic, and whether it was not finite somewhere."""
    operands = Operands.whole([grad], [grad], [[torch.zeros_like(grad)], [exp_avg_sq]])
    coefficients = torch.tensor([STATISTIC.coefficients(GROUP, step)], dtype=torch.float64).float()
    limits, scales = FixedPoint.of([STATISTIC.bound(GROUP)], [1], torch.device("cpu")).limits, torch.tensor([2.0**bits])
    sums, non_finite = BACKEND.observe(STATISTIC, operands, coefficients, limits, scales, None)
    return int(sums[0]), bool(non_finite[0])


@given(
    st.integers(1, 300), st.lists(st.integers(0, 300), max_size=8), st.integers(0, 10**6), st.sampled_from([torch.float32, torch.bfloat16])
)
@settings(deadline=None, max_examples=examples(60))
def test_any_cut_gives_the_same_total(numel: int, cuts: list[int], seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    grad = (torch.randn(numel, generator=generator) * 10 ** torch.empty(numel).uniform_(-6, 4, generator=generator)).to(dtype)
    second = torch.rand(numel, generator=generator) ** 4
    bits = fraction_bits(STATISTIC.bound(GROUP), numel)
    whole = observed(grad, second, bits)
    bounds = [0, *sorted(min(cut, numel) for cut in cuts), numel]
    parts = [observed(grad[a:b], second[a:b], bits) for a, b in pairwise(bounds)]
    assert (sum(total for total, _ in parts), any(bad for _, bad in parts)) == whole


@given(st.floats(0.0, 0.9999999), st.integers(1, 2**40))
def test_no_sum_overflows(beta2: float, numel: int) -> None:
    """Every element at the bound, and every partial sum, fit the integers that hold them."""
    bound = STATISTIC.bound({"betas": (0.9, beta2)})
    bits = fraction_bits(bound, numel)
    assert numel * bound * 2.0**bits <= 2.0**62
    assert float(FixedPoint.of([bound], [numel], torch.device("cpu")).limits) * 2.0**bits < 2.0**51, "the limit, rounded to fp32"


def test_the_bound_holds_when_every_gradient_is_a_spike() -> None:
    """v_t never falls below (1 - beta2) g^2, so a statistic beyond the bound can only come from a corrupt second moment.

    Roundings take it a few units in the last place above.
    """
    grad = 1e15 * (1.0 + torch.rand(1000, generator=torch.Generator().manual_seed(0)))
    bits = fraction_bits(STATISTIC.bound(GROUP), 1000)
    total, non_finite = observed(grad, torch.zeros(1000), bits, step=100000)
    assert not non_finite
    assert math.isclose(total / 2**bits / 1000, 100.0, rel_tol=1e-6)
    assert observed(grad, torch.full((1000,), -1e30), bits)[1]


def test_terms_are_rounded_half_to_even() -> None:
    """A statistic of 1, 3, 5, 7 halves of the unit: 0, 2, 2 and 4 units."""
    for value, units in ((0.5, 0), (1.5, 2), (2.5, 2), (3.5, 4)):
        grad = torch.tensor([value])
        operands = Operands.whole([grad], [grad], [])
        sums, _ = BACKEND.observe(IDENTITY, operands, torch.empty(1, 0), torch.tensor([10.0]), torch.ones(1), None)
        assert int(sums[0]) == units


def test_zero_gradients_have_statistic_0_even_if_eps_squared_underflows() -> None:
    zeros = torch.zeros(3)
    operands = Operands.whole([zeros], [zeros], [[zeros], [zeros]])
    for eps in (0.0, 1e-30):
        coefficients = torch.tensor([STATISTIC.coefficients(GROUP | {"eps": eps}, 1)], dtype=torch.float64).float()
        sums, non_finite = BACKEND.observe(STATISTIC, operands, coefficients, torch.tensor([100.0]), torch.tensor([2.0**44]), None)
        assert (int(sums[0]), int(non_finite[0])) == (0, 0)


@given(st.floats(0.0, 0.9999999), st.integers(1, 2**24))
def test_bias_correction_has_the_same_bits_for_ints_and_tensors(beta: float, step: int) -> None:
    """On the host steps are ints, on a device tensors; either way within 1e-12 of pow."""
    from_int, from_tensor = bias_correction(beta, step), bias_correction(beta, torch.tensor([step, 1]))
    assert from_int == float(from_tensor[0])
    assert float(from_tensor[1]) == 1.0 - beta
    assert math.isclose(from_int, 1.0 - beta**step, rel_tol=1e-9, abs_tol=1e-12)
