"""Adam (Kingma & Ba 2015, algorithm 1). Its math also covers AdamW's decoupled decay (Loshchilov & Hutter 2019, algorithm 2) and AMSGrad
(Reddi et al. 2018, algorithm 2).

    g     <- g + l2 * theta                             l2, decay: see weight_decay.py; one of them does nothing
    theta <- decay * theta
    m     <- m + (1 - beta1) * (g - m)
    v     <- beta2 * v + (1 - beta2) * g^2
    theta <- theta - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

AMSGrad uses the largest v so far in the last line. The code multiplies numerator and denominator of that line's fraction by
sqrt(1 - beta2^t), which saves a division per element. Apart from that the order of operations is torch.optim.AdamW's, so that the two
differ by single roundings. optimi stores debiased moments instead of m and v, which is the same in exact arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from sharded_optim.formulas import Algorithm, Coefficients
from sharded_optim.formulas import operations as xp
from sharded_optim.formulas.hyperparameters import Float, Floats, Switch
from sharded_optim.formulas.scalars import Number, Step, bias_correction, divide, sqrt
from sharded_optim.formulas.weight_decay import COUPLED, decay_coefficients, form_of
from sharded_optim.optimizers.constructors import spelled_out
from sharded_optim.step.engine import Engine
from sharded_optim.step.options import EngineOptions, Params

__all__ = ["ADAM", "AMSGRAD", "HYPERPARAMETERS", "Adam", "choose"]


def moments(grad, exp_avg, exp_avg_sq, from_grad, weight1, beta2, one_minus_beta2):
    exp_avg = xp.where(from_grad > 0.0, grad, exp_avg) + weight1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (grad * grad)
    return exp_avg, exp_avg_sq


def descent(exp_avg, exp_avg_sq, step_size, eps):
    return xp.divide(step_size * exp_avg, xp.sqrt(exp_avg_sq) + eps)


def update(param, grad, exp_avg, exp_avg_sq, l2, decay, from_grad, weight1, beta2, one_minus_beta2, step_size, eps):
    grad = grad + l2 * param
    exp_avg, exp_avg_sq = moments(grad, exp_avg, exp_avg_sq, from_grad, weight1, beta2, one_minus_beta2)
    param = decay * param - descent(exp_avg, exp_avg_sq, step_size, eps)
    return param, exp_avg, exp_avg_sq


def update_amsgrad(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, l2, decay, from_grad, weight1, beta2, one_minus_beta2, step_size, eps):
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
    """Compute the last eight arguments of `update`. `lr_scale` multiplies the learning rate, in the step and in the decay."""
    beta1, beta2 = group["betas"]
    correction2 = bias_correction(beta2, step)
    # The moving average is computed from the nearer end, as in torch's lerp: from the other end, a small average could be the difference of
    # two large numbers.
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
    ignored_state=frozenset({"max_exp_avg_sq"}),
)
AMSGRAD = Algorithm(
    name="amsgrad",
    state=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    update=update_amsgrad,
    undo=undo_amsgrad,
    coefficients=coefficients,
    optional_state=frozenset({"max_exp_avg_sq"}),
)


def choose(group: Mapping[str, Any]) -> Algorithm:
    return AMSGRAD if group.get("amsgrad") else ADAM


HYPERPARAMETERS = (*Engine.hyperparameters, Floats("betas", count=2), Float("eps"))


@spelled_out
class Adam(Engine):
    """Adam with optimi's signature and defaults: weight decay through the gradient (L2) unless decoupled.

    Args:
        params: parameters, named parameters or param groups: ordinary tensors, DTensors (FSDP2, HSDP, tensor parallelism) or, with
            `layout`, flattened ones (FSDP1, DeepSpeed); float32, bfloat16 or float16, any shape.
        lr: learning rate; a float or a one-element tensor.
        betas: decay of the moving averages of the gradient and of its square, each in [0, 1).
        weight_decay: lambda; lambda times the parameter is added to its gradient, unless the options below say otherwise.
        eps: added to the root of the second moment.
        decouple_wd: a step multiplies a parameter by (1 - lr * lambda) instead, as AdamW.
        decouple_lr: a step multiplies a parameter by (1 - lambda * lr / max_lr) instead, whatever `decouple_wd` says.
        max_lr: peak of the schedule, to which the decoupled and corrected forms refer; None means each group's lr at construction, or the
            largest lr so far if that is 0.
        decay_form: "l2" (the default), "coupled", "decoupled" or "corrected" (docs/weight-decay.md).
        kahan_sum, foreach, triton, gradient_release, options: see `EngineOptions` and `SwitchOptions`.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter cannot be optimized.

    Warns:
        UserWarning: a fully decoupled weight decay of 1e-3 or more, usual for a coupled one.
    """

    hyperparameters = (*HYPERPARAMETERS, Switch("amsgrad"))
    algorithms: ClassVar = {"": ADAM}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        eps: float = 1e-6,
        decouple_wd: bool = False,
        decouple_lr: bool = False,
        max_lr: float | None = None,
        kahan_sum: bool | None = None,
        foreach: bool | None = None,
        triton: bool | None = None,
        gradient_release: bool = False,
        *,
        decay_form: str | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        if decouple_wd and decay_form not in (None, COUPLED):
            raise ValueError(f"decouple_wd=True means decay_form={COUPLED!r}, got decay_form={decay_form!r}; give one of the two")
        form = form_of(decouple_wd=decouple_wd, decouple_lr=decouple_lr, decay_form=decay_form)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decay_form": form}
        switches: dict[str, Any] = {"kahan_sum": kahan_sum, "foreach": foreach, "triton": triton, "gradient_release": gradient_release}
        super().__init__(params, defaults, algorithm=choose, max_lr=max_lr, **switches, **options)
