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
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from sharded_optim.formulas import Algorithm, Choose, Coefficients
from sharded_optim.formulas import operations as xp
from sharded_optim.formulas.hyperparameters import Float, Floats, Switch
from sharded_optim.formulas.scalars import Number, Step, bias_correction, divide, sqrt
from sharded_optim.formulas.weight_decay import COUPLED, DECOUPLED, decay_coefficients, form_of
from sharded_optim.optimizers import functional
from sharded_optim.optimizers.constructors import spelled_out
from sharded_optim.step.engine import Engine
from sharded_optim.step.options import EngineOptions, Params, SwitchOptions

__all__ = ["ADAM", "AMSGRAD", "HYPERPARAMETERS", "Adam", "AdamW", "DecoupledAdamW", "OptimiAdamW", "choose"]


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
        weight_decay: lambda; lambda times the parameter is added to its gradient, or what `decouple_wd` or `decouple_lr` say.
        eps: added to the root of the second moment.
        decouple_wd: a step multiplies a parameter by (1 - lr * lambda) instead, as AdamW.
        decouple_lr: by (1 - lambda * lr / max_lr) instead, whatever `decouple_wd`.
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
        super().__init__(
            params,
            defaults,
            algorithm=choose,
            max_lr=max_lr,
            kahan_sum=kahan_sum,
            foreach=foreach,
            triton=triton,
            gradient_release=gradient_release,
            **options,
        )


class OptimiAdamW(Engine):
    """Base of AdamW and StableAdamW: the constructor of optimi's classes of these names. Subclasses set `_choose_algorithm`."""

    _choose_algorithm: ClassVar[Choose]

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-2,
        eps: float = 1e-6,
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
        form = form_of(decouple_wd=True, decouple_lr=decouple_lr, decay_form=decay_form)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decay_form": form}
        super().__init__(
            params,
            defaults,
            algorithm=type(self)._choose_algorithm,
            max_lr=max_lr,
            kahan_sum=kahan_sum,
            foreach=foreach,
            triton=triton,
            gradient_release=gradient_release,
            **options,
        )


@spelled_out
class AdamW(OptimiAdamW):
    """AdamW with optimi's signature and defaults.

    Args:
        params: parameters, named parameters or param groups: ordinary tensors, DTensors (FSDP2, HSDP, tensor parallelism) or, with
            `layout`, flattened ones (FSDP1, DeepSpeed); float32, bfloat16 or float16, any shape.
        lr: learning rate; a float or a one-element tensor.
        betas: decay of the moving averages of the gradient and of its square, each in [0, 1).
        weight_decay: lambda; a step multiplies a parameter by (1 - lr * lambda), as in torch, or by what `decay_form` says.
        eps: added to the root of the second moment.
        decouple_lr: the same as decay_form="decoupled": (1 - lambda * lr / max_lr).
        max_lr: peak of the schedule, to which the decoupled and corrected forms refer; None means each group's lr at construction, or the
            largest lr so far if that is 0.
        decay_form: "coupled" (the default), "decoupled" or "corrected" (docs/weight-decay.md).
        kahan_sum, foreach, triton, gradient_release, options: see `EngineOptions` and `SwitchOptions`.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter cannot be optimized.

    Warns:
        UserWarning: a fully decoupled weight decay of 1e-3 or more, usual for a coupled one.
    """

    hyperparameters = (*HYPERPARAMETERS, Switch("amsgrad"))
    algorithms: ClassVar = {"": ADAM}
    _choose_algorithm = staticmethod(choose)


@spelled_out
class DecoupledAdamW(Engine):
    """AdamW with fully decoupled weight decay, with the signature and defaults of MosaicML Composer's DecoupledAdamW.

    A step first multiplies each parameter by (1 - weight_decay * lr / reference_lr).

    Args:
        params: parameters, named parameters or param groups: ordinary tensors, DTensors (FSDP2, HSDP, tensor parallelism) or, with
            `layout`, flattened ones (FSDP1, DeepSpeed); float32, bfloat16 or float16, any shape.
        lr: learning rate; a float or a one-element tensor. The value at construction is the reference of the decay, per group, unless
            `max_lr` is given; if it is 0, the largest lr so far is.
        betas: decay of the moving averages of the gradient and of its square, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: fraction by which a step at the reference learning rate shrinks a parameter.
        amsgrad: divide by the largest second moment so far (Reddi et al. 2018).
        max_lr: peak of the schedule, where `lr` is not.
        options: see `EngineOptions` and `SwitchOptions`.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter cannot be optimized.

    Warns:
        UserWarning: a weight decay of 1e-3 or more, usual for a coupled one.
    """

    replaces_composer = True
    hyperparameters = (*HYPERPARAMETERS, Switch("amsgrad"))
    algorithms: ClassVar = {"": ADAM, "amsgrad": AMSGRAD}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-5,
        amsgrad: bool = False,
        *,
        max_lr: float | None = None,
        **options: Unpack[SwitchOptions],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad, "decay_form": DECOUPLED}
        super().__init__(params, defaults, algorithm=choose, max_lr=max_lr, **options)

    @staticmethod
    def adamw(
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        state_steps: list[Tensor],
        *,
        amsgrad: bool,
        beta1: float,
        beta2: float,
        lr: float,
        initial_lr: float,
        weight_decay: float,
        eps: float,
    ) -> None:
        """One step on ordinary tensors of any shapes, in place, with Composer's signature.

        Args:
            params, exp_avgs, exp_avg_sqs: written.
            grads: read-only.
            max_exp_avg_sqs: written; may be empty without `amsgrad`.
            state_steps: of each parameter, 1 in its first step; not advanced here.
            initial_lr: reference learning rate of the decay; at 0 nothing decays.

        Raises:
            ValueError: lists of different lengths.
        """
        group = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
        group |= {"amsgrad": amsgrad, "decay_form": DECOUPLED, "reference_lr": initial_lr}
        states = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs) if amsgrad else (exp_avgs, exp_avg_sqs)
        functional.update(choose(group), group, params, grads, states, [functional.counter(step) - 1 for step in state_steps])
