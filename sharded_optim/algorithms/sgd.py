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
from typing import Any

from sharded_optim.algorithms import Algorithm, Coefficients
from sharded_optim.algorithms import operations as xp
from sharded_optim.algorithms.scalars import Number, Step, at_first_step
from sharded_optim.algorithms.weight_decay import decay_coefficients

__all__ = ["MOMENTUM", "SGD", "choose"]


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
    """The last three arguments of `update`."""
    return (*decay_coefficients(group, lr_scale), lr_scale * group["lr"])


def coefficients_momentum(group: Mapping[str, Any], step: Step, lr_scale: Number) -> Coefficients:
    """The last six arguments of `update_momentum`."""
    one_minus_dampening = at_first_step(step, 1.0, 1.0 - group["dampening"])
    return (*coefficients(group, step, lr_scale), group["momentum"], one_minus_dampening, float(group["nesterov"]))


SGD = Algorithm(name="sgd", state=(), update=update, undo=undo, coefficients=coefficients, unused=frozenset({"momentum_buffer"}))
MOMENTUM = Algorithm(
    name="momentum_sgd",
    state=("momentum_buffer",),
    update=update_momentum,
    undo=undo_momentum,
    coefficients=coefficients_momentum,
    late=frozenset({"momentum_buffer"}),  # a buffer of zeros becomes the gradient ...
)
DAMPENED = replace(MOMENTUM, late=frozenset())  # ... unless it is dampened, which the first step alone must not be


def choose(group: Mapping[str, Any]) -> Algorithm:
    if group.get("amsgrad"):
        raise ValueError(f"amsgrad={group['amsgrad']!r} is not supported by SGD, which has no second moment; leave it out")
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError(
            f"nesterov=True needs momentum > 0 and dampening = 0, got momentum={group['momentum']!r}, dampening={group['dampening']!r}"
        )
    if group["momentum"] == 0:
        return SGD
    return DAMPENED if group["dampening"] else MOMENTUM
