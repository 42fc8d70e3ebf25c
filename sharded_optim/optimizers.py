"""The public optimizers: for each its signature, its defaults and which algorithm it runs.

Options that mean the same for every optimizer (`state_dtype`, `backend`, `nonfinite`, `process_group`) are described at `EngineOptions`.
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from sharded_optim.algorithms.adam import ADAM
from sharded_optim.algorithms.stable_adamw import STABLE_ADAMW
from sharded_optim.engine import Engine, EngineOptions, Params

__all__ = ["AdamW", "DecoupledAdamW", "StableAdamW"]


class DecoupledAdamW(Engine):
    """AdamW with fully decoupled weight decay, with the signature and defaults of MosaicML Composer's DecoupledAdamW.

    A step first multiplies each parameter by (1 - weight_decay * lr / reference_lr). The math is in `algorithms/adam.py`.

    Args:
        params: parameters, named parameters or param groups: ordinary tensors or DTensors (FSDP2, HSDP, tensor parallelism), float32,
            bfloat16 or float16, any shape.
        lr: learning rate; a float or a one-element tensor. The value at construction is the reference of the decay, per group, unless
            `max_lr` is given; if it is 0, the largest lr so far is.
        betas: decay of the moving averages of the gradient and of its square, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: fraction by which a step at the reference learning rate shrinks a parameter.
        max_lr: peak of the schedule, where `lr` is not.
        options: see `EngineOptions`. `nonfinite` is "allow" by default, as in torch: telling all ranks of a non-finite gradient would cost
            a collective, and this algorithm has none.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter cannot be optimized.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-5,
        *,
        max_lr: float | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decay_form": "decoupled"}
        super().__init__(params, defaults, algorithm=ADAM, max_lr=max_lr, **options)


class AdamW(Engine):
    """AdamW with optimi's signature and defaults. The math is in `algorithms/adam.py`.

    Args:
        params: parameters, named parameters or param groups: ordinary tensors or DTensors (FSDP2, HSDP, tensor parallelism), float32,
            bfloat16 or float16, any shape.
        lr: learning rate; a float or a one-element tensor.
        betas: decay of the moving averages of the gradient and of its square, each in [0, 1).
        weight_decay: lambda; a step multiplies a parameter by (1 - lr * lambda), as in torch, or by what `decay_form` says.
        eps: added to the root of the second moment.
        decouple_lr: the same as decay_form="decoupled": (1 - lambda * lr / max_lr).
        max_lr: peak of the schedule, to which the decoupled and corrected forms refer; None means each group's lr at construction, or the
            largest lr so far if that is 0.
        decay_form: "coupled" (the default), "decoupled" or "corrected"; see `algorithms/weight_decay.py`.
        options: see `EngineOptions`. `nonfinite` is "allow" by default, as in torch: telling all ranks of a non-finite gradient would cost
            a collective, and this algorithm has none.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter cannot be optimized.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-2,
        eps: float = 1e-6,
        decouple_lr: bool = False,
        max_lr: float | None = None,
        *,
        decay_form: str | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        form = _decay_form(decouple_lr, decay_form)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decay_form": form}
        super().__init__(params, defaults, algorithm=ADAM, max_lr=max_lr, **options)


class StableAdamW(Engine):
    """AdamW with the learning rate of each tensor divided by max(1, RMS of its update), with optimi's signature and defaults.

    The RMS is taken over the whole tensor, however it is sharded, with one small all-reduce per step for all tensors together. Every rank
    of `process_group` must call `step`, also with no gradient. The math is in `algorithms/stable_adamw.py`.

    Args:
        params: parameters, named parameters or param groups: ordinary tensors or DTensors (FSDP2, HSDP, tensor parallelism), float32,
            bfloat16 or float16, any shape. Where ranks hold different ordinary tensors (pipeline stages), pass named parameters.
        lr: learning rate; a float or a one-element tensor.
        betas: decay of the moving averages of the gradient and of its square, each in [0, 1).
        weight_decay: lambda; a step multiplies a parameter by (1 - lr' * lambda), with the clipped learning rate lr', or by what
            `decay_form` says.
        eps: added to the root of the second moment; its square bounds the second moment in the RMS from below.
        decouple_lr: the same as decay_form="decoupled": (1 - lambda * lr' / max_lr).
        max_lr: peak of the schedule, to which the decoupled and corrected forms refer; None means each group's lr at construction, or the
            largest lr so far if that is 0.
        decay_form: "coupled" (the default), "decoupled" or "corrected"; see `algorithms/weight_decay.py`.
        options: see `EngineOptions`. `nonfinite` is "skip" by default: the ranks agree on something anyway.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter cannot be optimized.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-2,
        eps: float = 1e-6,
        decouple_lr: bool = False,
        max_lr: float | None = None,
        *,
        decay_form: str | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        form = _decay_form(decouple_lr, decay_form)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decay_form": form}
        super().__init__(params, defaults, algorithm=STABLE_ADAMW, max_lr=max_lr, **options)


def _decay_form(decouple_lr: bool, decay_form: str | None) -> str:
    if decay_form is None:
        return "decoupled" if decouple_lr else "coupled"
    if decouple_lr and decay_form != "decoupled":
        raise ValueError(f"decouple_lr=True means decay_form='decoupled', got decay_form={decay_form!r}; give one of the two")
    return decay_form
