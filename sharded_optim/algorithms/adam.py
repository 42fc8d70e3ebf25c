"""Adam (Kingma & Ba 2015, algorithm 1), AdamW (Loshchilov & Hutter 2019, algorithm 2), and AMSGrad (Reddi et al. 2018, algorithm 2).

    g     <- g + l2 * theta                             l2, decay: see weight_decay.py; one of them does nothing
    theta <- decay * theta
    m     <- m + (1 - beta1) * (g - m)
    v     <- beta2 * v + (1 - beta2) * g^2
    theta <- theta - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

AMSGrad has max(v so far) for v in the last line, whose fraction is expanded by sqrt(1 - beta2^t): that saves each element a division. But
for that the order of operations is torch.optim.AdamW's, so that the two differ by single roundings. optimi keeps debiased moments instead
of m and v, which is the same in exact arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sharded_optim.algorithms import Algorithm, Coefficients
from sharded_optim.algorithms import operations as xp
from sharded_optim.algorithms.bias_correction import bias_correction
from sharded_optim.algorithms.scalars import Number, Step, divide, sqrt
from sharded_optim.algorithms.weight_decay import decay_coefficients

__all__ = ["ADAM", "AMSGRAD", "check_betas", "choose"]


def moments(grad, exp_avg, exp_avg_sq, from_grad, weight1, beta2, one_minus_beta2):
    exp_avg = xp.where(from_grad > 0.0, grad, exp_avg) + weight1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (grad * grad)
    return exp_avg, exp_avg_sq


def descent(exp_avg, exp_avg_sq, step_size, eps):
    return xp.divide(step_size * exp_avg, xp.sqrt(exp_avg_sq) + eps)


def update(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    l2,
    decay,
    from_grad,
    weight1,
    beta2,
    one_minus_beta2,
    step_size,
    eps,
):
    grad = grad + l2 * param
    exp_avg, exp_avg_sq = moments(grad, exp_avg, exp_avg_sq, from_grad, weight1, beta2, one_minus_beta2)
    param = decay * param - descent(exp_avg, exp_avg_sq, step_size, eps)
    return param, exp_avg, exp_avg_sq


def update_amsgrad(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    l2,
    decay,
    from_grad,
    weight1,
    beta2,
    one_minus_beta2,
    step_size,
    eps,
):
    grad = grad + l2 * param
    exp_avg, exp_avg_sq = moments(grad, exp_avg, exp_avg_sq, from_grad, weight1, beta2, one_minus_beta2)
    max_exp_avg_sq = xp.maximum(max_exp_avg_sq, exp_avg_sq)
    param = decay * param - descent(exp_avg, max_exp_avg_sq, step_size, eps)
    return param, exp_avg, exp_avg_sq, max_exp_avg_sq


def undo(param, grad, exp_avg, exp_avg_sq, *coefficients):
    _, decay, _, _, _, _, step_size, eps = coefficients
    return xp.divide(param + descent(exp_avg, exp_avg_sq, step_size, eps), decay)


def undo_amsgrad(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, *coefficients):
    return undo(param, grad, exp_avg, max_exp_avg_sq, *coefficients)


def coefficients(group: Mapping[str, Any], step: Step, lr_scale: Number) -> Coefficients:
    """The last eight arguments of `update`; `lr_scale` multiplies the learning rate, in the step and in the decay alike."""
    beta1, beta2 = group["betas"]
    correction2 = bias_correction(beta2, step)
    # The moving average is computed from the nearer end, as torch's lerp: from the other, a small one would be the difference of two large
    # numbers.
    from_grad = beta1 <= 0.5
    root = sqrt(correction2)
    return (
        *decay_coefficients(group, lr_scale),
        float(from_grad),
        -beta1 if from_grad else 1.0 - beta1,
        beta2,
        1.0 - beta2,
        divide(lr_scale * group["lr"], bias_correction(beta1, step)) * root,
        group["eps"] * root,
    )


ADAM = Algorithm(
    name="adam",
    state=("exp_avg", "exp_avg_sq"),
    update=update,
    undo=undo,
    coefficients=coefficients,
    unused=frozenset({"max_exp_avg_sq"}),
)
AMSGRAD = Algorithm(
    name="amsgrad",
    state=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    update=update_amsgrad,
    undo=undo_amsgrad,
    coefficients=coefficients,
    late=frozenset({"max_exp_avg_sq"}),
)


def check_betas(group: Mapping[str, Any]) -> None:
    """Raise ValueError unless there are two."""
    if len(group["betas"]) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']!r}")


def choose(group: Mapping[str, Any]) -> Algorithm:
    check_betas(group)
    return AMSGRAD if group.get("amsgrad") else ADAM
