"""StableAdamW: AdamW with Adafactor's update clipping (Wortsman et al. 2023, arXiv 2304.13013, algorithm 2), per tensor.

    m, v   as in AdamW, of this step
    RMS    = sqrt(mean over the tensor of g^2 / max(v / (1 - beta2^t), eps^2))
    lr'    = lr / max(1, RMS)
    theta <- AdamW's step with lr' for lr, in the decay too

The RMS uses the debiased second moment, v / (1 - beta2^t), as in optimi. Unlike in AdamW, a tensor whose gradient has outgrown its history
takes a smaller step.

The mean is over the whole tensor, so a rank that holds a slice cannot compute it alone. Since v >= (1 - beta2) g^2, each term is at most
(1 - beta2^t) / (1 - beta2); because of that bound the terms can be summed exactly in fixed point (`step/statistics.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from sharded_optim.formulas import Algorithm, Coefficients, Statistic
from sharded_optim.formulas import operations as xp
from sharded_optim.formulas.hyperparameters import Unsupported
from sharded_optim.formulas.scalars import Number, Step, bias_correction, divide, maximum, sqrt
from sharded_optim.formulas.weight_decay import L2
from sharded_optim.optimizers import adam
from sharded_optim.optimizers.adamw import OptimiAdamW
from sharded_optim.optimizers.constructors import spelled_out

__all__ = ["STABLE_ADAMW", "StableAdamW", "choose"]

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def observe(grad, exp_avg, exp_avg_sq, beta2, one_minus_beta2, bias_correction2, floor):
    square = grad * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * square
    # g^2 / max(v / c, eps^2), written as c g^2 / max(v, c eps^2): one division, and the floor is the same for all elements.
    return xp.divide(bias_correction2 * square, xp.where(exp_avg_sq < floor, floor, exp_avg_sq))


def observe_coefficients(group: Mapping[str, Any], step: Step) -> Coefficients:
    """Compute the last four arguments of `observe`."""
    _, beta2 = group["betas"]
    correction2 = bias_correction(beta2, step)
    floor = correction2 * group["eps"] ** 2
    # eps^2 underflows in fp32 for eps < 1e-19, and 0 / 0 would make a zero gradient NaN.
    return (beta2, 1.0 - beta2, correction2, maximum(floor, SMALLEST_NORMAL))


def bound(group: Mapping[str, Any]) -> float:
    _, beta2 = group["betas"]
    return 1.0 / (1.0 - beta2)


def lr_scale(group: Mapping[str, Any], mean: Number) -> Number:
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
    if group["decay_form"] == L2:
        raise ValueError(f"decay_form={L2!r} is not supported by StableAdamW, whose decay never goes through the gradient; use Adam")
    return STABLE_ADAMW


@spelled_out
class StableAdamW(OptimiAdamW):
    """AdamW with the learning rate of each tensor divided by max(1, RMS of its update), with optimi's signature and defaults.

    The RMS is taken over the whole tensor, however it is sharded, with one small all-reduce per step for all tensors together. Every rank
    of `process_group` must call `step`, also with no gradient.

    Args:
        params: parameters, named parameters or param groups: ordinary tensors, DTensors (FSDP2, HSDP, tensor parallelism) or, with
            `layout`, flattened ones (FSDP1, DeepSpeed); float32, bfloat16 or float16, any shape. Where ranks
            hold different ordinary tensors (pipeline stages), pass named parameters.
        lr: learning rate; a float or a one-element tensor.
        betas: decay of the moving averages of the gradient and of its square, each in [0, 1).
        weight_decay: lambda; a step multiplies a parameter by (1 - lr' * lambda), with the clipped learning rate lr', or by what
            `decay_form` says.
        eps: added to the root of the second moment; its square bounds the second moment in the RMS from below.
        decouple_lr: the same as decay_form="decoupled": (1 - lambda * lr' / max_lr).
        max_lr: peak of the schedule, to which the decoupled and corrected forms refer; None means each group's lr at construction, or the
            largest lr so far if that is 0.
        decay_form: "coupled" (the default), "decoupled" or "corrected" (docs/weight-decay.md).
        kahan_sum, foreach, triton, gradient_release, options: see `EngineOptions` and `SwitchOptions`.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter cannot be optimized.

    Warns:
        UserWarning: a fully decoupled weight decay of 1e-3 or more, usual for a coupled one.
    """

    hyperparameters = (*adam.HYPERPARAMETERS, Unsupported("amsgrad", by="StableAdamW", way_out="leave it out, or use DecoupledAdamW"))
    algorithms: ClassVar = {"": STABLE_ADAMW}
    _choose_algorithm = staticmethod(choose)
