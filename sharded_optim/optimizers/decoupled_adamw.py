"""AdamW with fully decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2, with its schedule multiplier eta), with Composer's
signature. Its math is in `adam.py`.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import Unpack

from sharded_optim.formulas.hyperparameters import Switch
from sharded_optim.formulas.weight_decay import DECOUPLED
from sharded_optim.optimizers import functional
from sharded_optim.optimizers.adam import ADAM, AMSGRAD, HYPERPARAMETERS, choose
from sharded_optim.optimizers.constructors import spelled_out
from sharded_optim.step.engine import Engine
from sharded_optim.step.options import Params, SwitchOptions

__all__ = ["DecoupledAdamW"]


@spelled_out
class DecoupledAdamW(Engine):
    """AdamW with fully decoupled weight decay, with the signature and defaults of MosaicML Composer's DecoupledAdamW.

    A step first multiplies each parameter by (1 - weight_decay * lr / reference_lr).

    Args:
        params: parameters, named parameters or param groups: ordinary tensors, DTensors (FSDP2, HSDP, tensor parallelism) or, with
            `layout`, flattened ones (FSDP1, DeepSpeed); float32, bfloat16 or float16, any shape.
        lr: learning rate; a float or a one-element tensor. Each group's lr at construction is its reference_lr, or the largest lr so far
            if that is 0, unless `max_lr` is given.
        betas: decay of the moving averages of the gradient and of its square, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: fraction by which a step at the reference learning rate shrinks a parameter.
        amsgrad: divide by the largest second moment so far (Reddi et al. 2018).
        max_lr: peak of the schedule, which becomes reference_lr; pass it if `lr` at construction is not the peak.
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
        """Take one step on ordinary tensors of any shapes, in place, with Composer's signature.

        Args:
            params, exp_avgs, exp_avg_sqs: written.
            grads: read-only.
            max_exp_avg_sqs: written; may be empty without `amsgrad`.
            state_steps: the step counter of each parameter, 1 in its first step; read-only.
            initial_lr: reference learning rate of the decay; at 0 nothing decays.

        Raises:
            ValueError: lists of different lengths.
        """
        group = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
        group |= {"amsgrad": amsgrad, "decay_form": DECOUPLED, "reference_lr": initial_lr}
        states = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs) if amsgrad else (exp_avgs, exp_avg_sqs)
        functional.update(choose(group), group, params, grads, states, [functional.counter(step) - 1 for step in state_steps])
