"""AdamW and DecoupledAdamW: Adam (Kingma & Ba 2015, algorithm 1) with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2).

    theta <- (1 - amount) * theta                       amount: see weight_decay.py
    m     <- m + (1 - beta1) * (g - m)
    v     <- beta2 * v + (1 - beta2) * g^2
    theta <- theta - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

The order of operations is that of torch.optim.AdamW, so that the two differ by single roundings. optimi keeps debiased moments instead of
m and v, which is the same in exact arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sharded_optim.algorithms import Algorithm, Coefficients, Number
from sharded_optim.algorithms import operations as xp
from sharded_optim.algorithms.bias_correction import bias_correction
from sharded_optim.algorithms.weight_decay import decay_amount

__all__ = ["ADAM"]


def update(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    decay,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    step_size,
    root_bias_correction2,
    eps,
):
    difference = grad - exp_avg
    # From the nearer end, as torch's lerp: from the other a small average would be the difference of two large numbers.
    exp_avg = xp.where(beta1 <= 0.5, grad - beta1 * difference, exp_avg + one_minus_beta1 * difference)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (grad * grad)
    denominator = xp.divide(xp.sqrt(exp_avg_sq), root_bias_correction2) + eps
    param = decay * param - xp.divide(step_size * exp_avg, denominator)
    return param, exp_avg, exp_avg_sq


def coefficients(group: Mapping[str, Any], step: int | Tensor, lr_scale: Number) -> Coefficients:
    """The last eight arguments of `update`; `lr_scale` multiplies the learning rate, in the step and in the decay alike."""
    beta1, beta2 = group["betas"]
    amount = decay_amount(group["decay_form"], group["lr"], group["reference_lr"], group["weight_decay"])
    correction2 = bias_correction(beta2, step)
    return (
        1.0 - lr_scale * amount,
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        lr_scale * group["lr"] / bias_correction(beta1, step),
        torch.sqrt(correction2) if isinstance(correction2, Tensor) else math.sqrt(correction2),
        group["eps"],
    )


ADAM = Algorithm(name="adam", state=("exp_avg", "exp_avg_sq"), update=update, coefficients=coefficients)
