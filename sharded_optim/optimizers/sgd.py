"""SGDW: stochastic gradient descent with momentum and decoupled weight decay (Loshchilov & Hutter 2019, algorithm 1).

    g      <- g + l2 * theta                            l2, decay: see weight_decay.py; one of them does nothing
    theta  <- decay * theta
    buffer <- mu * buffer + (1 - dampening) * g         in the first step: buffer <- g
    theta  <- theta - lr * buffer                       nesterov: theta - lr * (g + mu * buffer)

Without momentum there is no buffer, and theta <- theta - lr * g. Momentum and its first step are those of torch.optim.SGD (Sutskever et al.
2013 scale the velocity by lr instead); the decay comes before the step, as in Composer's DecoupledSGDW.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from sharded_optim.formulas import Algorithm, Coefficients
from sharded_optim.formulas import operations as xp
from sharded_optim.formulas.hyperparameters import Float, Switch, Unsupported
from sharded_optim.formulas.scalars import Number, Step, at_first_step
from sharded_optim.formulas.weight_decay import DECOUPLED, decay_coefficients
from sharded_optim.optimizers import functional
from sharded_optim.optimizers.constructors import spelled_out
from sharded_optim.step.engine import Engine
from sharded_optim.step.options import Params, SwitchOptions

__all__ = ["MOMENTUM", "SGD", "DecoupledSGDW", "choose"]


def update(param, grad, l2, decay, lr):
    grad = grad + l2 * param
    return (decay * param - lr * grad,)


def undo(param, grad, l2, decay, lr):
    return xp.divide(param + lr * grad, decay - lr * l2)


def update_momentum(param, grad, momentum_buffer, l2, decay, lr, momentum, one_minus_dampening, nesterov):
    grad = grad + l2 * param
    momentum_buffer = momentum * momentum_buffer + one_minus_dampening * grad
    direction = xp.where(nesterov > 0.0, grad + momentum * momentum_buffer, momentum_buffer)
    return decay * param - lr * direction, momentum_buffer


def undo_momentum(param, grad, momentum_buffer, l2, decay, lr, momentum, one_minus_dampening, nesterov):
    direction = xp.where(nesterov > 0.0, grad + momentum * momentum_buffer, momentum_buffer)
    return xp.divide(param + lr * direction, decay - nesterov * lr * l2)


def coefficients(group: Mapping[str, Any], step: Step, lr_scale: Number) -> Coefficients:
    """Compute the last three arguments of `update`."""
    return (*decay_coefficients(group, lr_scale), lr_scale * group["lr"])


def coefficients_momentum(group: Mapping[str, Any], step: Step, lr_scale: Number) -> Coefficients:
    """Compute the last six arguments of `update_momentum`."""
    one_minus_dampening = at_first_step(step, 1.0, 1.0 - group["dampening"])
    return (*coefficients(group, step, lr_scale), group["momentum"], one_minus_dampening, float(group["nesterov"]))


SGD = Algorithm(name="sgd", state=(), update=update, undo=undo, coefficients=coefficients, ignored_state=frozenset({"momentum_buffer"}))
MOMENTUM = Algorithm(
    name="momentum_sgd",
    state=("momentum_buffer",),
    update=update_momentum,
    undo=undo_momentum,
    coefficients=coefficients_momentum,
    optional_state=frozenset({"momentum_buffer"}),  # zeros stand for a missing buffer: a step sets it to the gradient ...
)
DAMPENED = replace(MOMENTUM, optional_state=frozenset())  # ... but not with dampening, which a first step must not apply


def choose(group: Mapping[str, Any]) -> Algorithm:
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError(
            f"nesterov=True needs momentum > 0 and dampening = 0, got momentum={group['momentum']!r}, dampening={group['dampening']!r}"
        )
    if group["momentum"] == 0:
        return SGD
    return DAMPENED if group["dampening"] else MOMENTUM


@spelled_out
class DecoupledSGDW(Engine):
    """SGD with momentum and fully decoupled weight decay, with the signature and defaults of MosaicML Composer's DecoupledSGDW.

    A step first multiplies each parameter by (1 - weight_decay * lr / reference_lr).

    Args:
        params: parameters, named parameters or param groups: ordinary tensors, DTensors (FSDP2, HSDP, tensor parallelism) or, with
            `layout`, flattened ones (FSDP1, DeepSpeed); float32, bfloat16 or float16, any shape.
        lr: learning rate; a float or a one-element tensor. Each group's lr at construction is its reference_lr, or the largest lr so far
            if that is 0, unless `max_lr` is given.
        momentum: decay of the momentum buffer; with 0 there is no buffer.
        dampening: a gradient is multiplied by (1 - dampening) when it is added to the buffer, except in the first step.
        weight_decay: fraction by which a step at the reference learning rate shrinks a parameter.
        nesterov: step along the gradient plus momentum times the buffer; needs momentum > 0 and no dampening.
        max_lr: peak of the schedule, which becomes reference_lr; pass it if `lr` at construction is not the peak.
        options: see `EngineOptions` and `SwitchOptions`.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter cannot be optimized.

    Warns:
        UserWarning: a weight decay of 1e-3 or more, usual for a coupled one.
    """

    replaces_composer = True
    hyperparameters = (
        *Engine.hyperparameters,
        Float("momentum"),
        Float("dampening"),
        Switch("nesterov"),
        Unsupported("amsgrad", by="SGD, which has no second moment,"),
    )
    algorithms: ClassVar = {"": SGD, "momentum": MOMENTUM}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
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
        super().__init__(params, defaults, algorithm=choose, max_lr=max_lr, **options)

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
        """Take one step on ordinary tensors of any shapes, in place, with Composer's signature.

        Args:
            params: written.
            d_p_list: gradients, read-only.
            momentum_buffer_list: written; None, for a parameter that has not stepped yet, is replaced by a new buffer.
            initial_lr: reference learning rate of the decay; at 0 nothing decays.

        Raises:
            ValueError: lists of different lengths, or Nesterov momentum without momentum or with dampening.
        """
        group = {"lr": lr, "momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": weight_decay}
        group |= {"decay_form": DECOUPLED, "reference_lr": initial_lr}
        algorithm = choose(group)
        steps = [functional.counter(buffer is not None) for buffer in momentum_buffer_list]
        pairs = zip(momentum_buffer_list, d_p_list, strict=False)  # `update` checks all lengths
        buffers = [torch.zeros_like(grad) if buffer is None else buffer for buffer, grad in pairs]
        functional.update(algorithm, group, params, d_p_list, [buffers] if algorithm.state else [], steps)
        if algorithm.state:
            momentum_buffer_list[:] = buffers
