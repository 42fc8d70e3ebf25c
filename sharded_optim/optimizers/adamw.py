"""AdamW (Loshchilov & Hutter 2019, algorithm 2) with optimi's signature. Its math is in `adam.py`, with decoupled decay."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from sharded_optim.formulas import Choose
from sharded_optim.formulas.hyperparameters import Switch
from sharded_optim.formulas.weight_decay import form_of
from sharded_optim.optimizers.adam import ADAM, HYPERPARAMETERS, choose
from sharded_optim.optimizers.constructors import spelled_out
from sharded_optim.step.engine import Engine
from sharded_optim.step.options import EngineOptions, Params

__all__ = ["AdamW", "OptimiAdamW"]


class OptimiAdamW(Engine):
    """Base of AdamW and StableAdamW, with the constructor of optimi's classes. Subclasses set `_choose_algorithm`."""

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
        switches: dict[str, Any] = {"kahan_sum": kahan_sum, "foreach": foreach, "triton": triton, "gradient_release": gradient_release}
        super().__init__(params, defaults, algorithm=type(self)._choose_algorithm, max_lr=max_lr, **switches, **options)


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
