"""StableAdamW: AdamW with Adafactor's update clipping (Wortsman et al. 2023, arXiv 2304.13013, algorithm 2), per tensor.

    m, v   as in AdamW, of this step
    RMS    = sqrt(mean over the tensor of g^2 / max(v / (1 - beta2^t), eps^2))
    lr'    = lr / max(1, RMS)
    theta <- AdamW's step with lr' for lr, in the decay too

v here is the debiased one, as in optimi. Against AdamW, a tensor whose gradient outgrew its history takes a smaller step.

The mean runs over the whole tensor, so a rank that holds a slice cannot know it alone. Since v >= (1 - beta2) g^2, each term is at most
(1 - beta2^t) / (1 - beta2), which is what allows to sum it exactly in fixed point (`statistics.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sharded_optim.algorithms import Algorithm, Coefficients, Statistic, adam
from sharded_optim.algorithms import operations as xp
from sharded_optim.algorithms.bias_correction import bias_correction
from sharded_optim.algorithms.scalars import Number, Step, divide, maximum, sqrt
from sharded_optim.algorithms.weight_decay import L2

__all__ = ["STABLE_ADAMW", "choose"]

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def observe(grad, exp_avg, exp_avg_sq, beta2, one_minus_beta2, bias_correction2, floor):
    square = grad * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * square
    # g^2 / max(v / c, eps^2) as c g^2 / max(v, c eps^2): one division, and the floor is a constant.
    return xp.divide(bias_correction2 * square, xp.where(exp_avg_sq < floor, floor, exp_avg_sq))


def observe_coefficients(group: Mapping[str, Any], step: Step) -> Coefficients:
    """The last four arguments of `observe`."""
    _, beta2 = group["betas"]
    correction2 = bias_correction(beta2, step)
    floor = correction2 * group["eps"] ** 2
    # eps^2 underflows in fp32 for eps < 1e-19, and 0 / 0 would make a zero gradient NaN.
    return (beta2, 1.0 - beta2, correction2, maximum(floor, SMALLEST_NORMAL))


def bound(group: Mapping[str, Any]) -> float:
    _, beta2 = group["betas"]
    return 1.0 / (1.0 - beta2)


def lr_scale(mean: Number) -> Number:
    return divide(1.0, maximum(sqrt(mean), 1.0))


STABLE_ADAMW = Algorithm(
    name="stable_adamw",
    state=adam.ADAM.state,
    update=adam.update,
    undo=adam.undo,
    coefficients=adam.coefficients,
    statistic=Statistic(observe=observe, coefficients=observe_coefficients, bound=bound, lr_scale=lr_scale),
)


def choose(group: Mapping[str, Any]) -> Algorithm:
    adam.check_betas(group)
    if group["decay_form"] == L2:
        raise ValueError(f"decay_form={L2!r} is not supported by StableAdamW, whose decay never goes through the gradient; use Adam")
    if group.get("amsgrad"):
        raise ValueError(f"amsgrad={group['amsgrad']!r} is not supported by StableAdamW; leave it out, or use DecoupledAdamW")
    return STABLE_ADAMW
