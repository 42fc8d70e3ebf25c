"""The public optimizers: for each its signature, its defaults and which algorithm it runs.

Options that mean the same for every optimizer are described at `EngineOptions` and `SwitchOptions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from sharded_optim import functional
from sharded_optim.algorithms import Algorithm, adam, sgd, stable_adamw
from sharded_optim.algorithms.weight_decay import COUPLED, DECOUPLED, form_of
from sharded_optim.engine import Engine
from sharded_optim.options import EngineOptions, Params, SwitchOptions

__all__ = ["Adam", "AdamW", "DecoupledAdamW", "DecoupledSGDW", "StableAdamW"]


class DecoupledAdamW(Engine):
    """AdamW with fully decoupled weight decay, with the signature and defaults of MosaicML Composer's DecoupledAdamW.

    A step first multiplies each parameter by (1 - weight_decay * lr / reference_lr). The math is in `algorithms/adam.py`.

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
        options: see `EngineOptions` and `SwitchOptions`. `nonfinite` is "allow" by default, as in torch: telling all ranks of a non-finite
            gradient would cost a collective, and this algorithm has none.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter cannot be optimized.

    Warns:
        UserWarning: a weight decay of 1e-3 or more, usual for a coupled one.
    """

    replaces_composer = True

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
        super().__init__(params, defaults, algorithm=adam.choose, max_lr=max_lr, **options)

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
        functional.update(adam.choose(group), group, params, grads, states, [functional.counter(step) - 1 for step in state_steps])


class DecoupledSGDW(Engine):
    """SGD with momentum and fully decoupled weight decay, with the signature and defaults of MosaicML Composer's DecoupledSGDW.

    A step first multiplies each parameter by (1 - weight_decay * lr / reference_lr). The math is in `algorithms/sgd.py`.

    Args:
        params: parameters, named parameters or param groups: ordinary tensors, DTensors (FSDP2, HSDP, tensor parallelism) or, with
            `layout`, flattened ones (FSDP1, DeepSpeed); float32, bfloat16 or float16, any shape.
        lr: learning rate; a float or a one-element tensor. The value at construction is the reference of the decay, per group, unless
            `max_lr` is given; if it is 0, the largest lr so far is.
        momentum: decay of the momentum buffer; with 0 there is no buffer.
        dampening: the buffer takes up (1 - dampening) of a gradient, in the first step all of it.
        weight_decay: fraction by which a step at the reference learning rate shrinks a parameter.
        nesterov: step along the gradient plus momentum times the buffer; needs momentum > 0 and no dampening.
        max_lr: peak of the schedule, where `lr` is not.
        options: see `EngineOptions` and `SwitchOptions`. `nonfinite` is "allow" by default: see `DecoupledAdamW`.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter cannot be optimized.

    Warns:
        UserWarning: a weight decay of 1e-3 or more, usual for a coupled one.
    """

    replaces_composer = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        max_lr: float | None = None,
        **options: Unpack[SwitchOptions],
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        defaults |= {"nesterov": nesterov, "decay_form": DECOUPLED}
        super().__init__(params, defaults, algorithm=sgd.choose, max_lr=max_lr, **options)

    @staticmethod
    def sgdw(
        params: list[Tensor],
        d_p_list: list[Tensor],
        momentum_buffer_list: list[Tensor | None],
        *,
        weight_decay: float,
        momentum: float,
        lr: float,
        initial_lr: float,
        dampening: float,
        nesterov: bool,
    ) -> None:
        """One step on ordinary tensors of any shapes, in place, with Composer's signature.

        Args:
            params: written.
            d_p_list: gradients, read-only.
            momentum_buffer_list: written; None, of a parameter that has not stepped yet, is replaced by a new buffer.
            initial_lr: reference learning rate of the decay; at 0 nothing decays.

        Raises:
            ValueError: lists of different lengths, or Nesterov momentum without momentum or with dampening.
        """
        group = {"lr": lr, "momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": weight_decay}
        group |= {"decay_form": DECOUPLED, "reference_lr": initial_lr}
        algorithm = sgd.choose(group)
        steps = [functional.counter(buffer is not None) for buffer in momentum_buffer_list]
        pairs = zip(momentum_buffer_list, d_p_list, strict=False)  # lengths are checked with all others
        buffers = [torch.zeros_like(grad) if buffer is None else buffer for buffer, grad in pairs]
        functional.update(algorithm, group, params, d_p_list, [buffers] if algorithm.state else [], steps)
        if algorithm.state:
            momentum_buffer_list[:] = buffers


class Adam(Engine):
    """Adam with optimi's signature and defaults: weight decay through the gradient (L2) unless decoupled. See `algorithms/adam.py`.

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
        kahan_sum, foreach, triton, gradient_release: see `SwitchOptions`.
        decay_form: "l2" (the default), "coupled", "decoupled" or "corrected"; see `algorithms/weight_decay.py`.
        options: see `EngineOptions`. `nonfinite` is "allow" by default: see `AdamW`.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter cannot be optimized.

    Warns:
        UserWarning: a fully decoupled weight decay of 1e-3 or more, usual for a coupled one.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
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
            algorithm=adam.choose,
            max_lr=max_lr,
            kahan_sum=kahan_sum,
            foreach=foreach,
            triton=triton,
            gradient_release=gradient_release,
            **options,
        )


class _OptimiAdamW(Engine):
    """What optimi's AdamW and StableAdamW have in common: their arguments."""

    _algorithm: ClassVar[staticmethod[[Mapping[str, Any]], Algorithm]]

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
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
            algorithm=self._algorithm,
            max_lr=max_lr,
            kahan_sum=kahan_sum,
            foreach=foreach,
            triton=triton,
            gradient_release=gradient_release,
            **options,
        )


class AdamW(_OptimiAdamW):
    """AdamW with optimi's signature and defaults. The math is in `algorithms/adam.py`.

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
        kahan_sum, foreach, triton, gradient_release: see `SwitchOptions`.
        decay_form: "coupled" (the default), "decoupled" or "corrected"; see `algorithms/weight_decay.py`.
        options: see `EngineOptions`. `nonfinite` is "allow" by default, as in torch: telling all ranks of a non-finite gradient would cost
            a collective, and this algorithm has none.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter cannot be optimized.

    Warns:
        UserWarning: a fully decoupled weight decay of 1e-3 or more, usual for a coupled one.
    """

    _algorithm = staticmethod(adam.choose)


class StableAdamW(_OptimiAdamW):
    """AdamW with the learning rate of each tensor divided by max(1, RMS of its update), with optimi's signature and defaults.

    The RMS is taken over the whole tensor, however it is sharded, with one small all-reduce per step for all tensors together. Every rank
    of `process_group` must call `step`, also with no gradient. The math is in `algorithms/stable_adamw.py`.

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
        kahan_sum, foreach, triton, gradient_release: see `SwitchOptions`.
        decay_form: "coupled" (the default), "decoupled" or "corrected"; see `algorithms/weight_decay.py`.
        options: see `EngineOptions`. `nonfinite` is "skip" by default: the ranks agree on something anyway.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter cannot be optimized.

    Warns:
        UserWarning: a fully decoupled weight decay of 1e-3 or more, usual for a coupled one.
    """

    _algorithm = staticmethod(stable_adamw.choose)
