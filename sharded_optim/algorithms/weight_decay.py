"""Decoupled weight decay (Loshchilov & Hutter 2019): theta <- theta * (1 - amount) before each step, never through the gradient.

With alpha the reference (peak) learning rate and s = lr / alpha the schedule's multiplier, libraries mean different amounts by the same
`weight_decay=lambda`:

    coupled     amount = lr * lambda               torch.optim.AdamW, optimi's default
    decoupled   amount = (lr / alpha) * lambda     Composer, optimi's decouple_lr, and the AdamW paper (its eta_t * lambda)
    corrected   amount = lr * (lr / alpha) * lambda    AdamC (Defazio 2025, arXiv 2506.02285)

alpha is the optimizer's own `reference_lr` in each param group. It is not `initial_lr` or `max_lr`: schedulers overwrite those.
"""

from __future__ import annotations

from collections.abc import Callable

from sharded_optim.algorithms import Number

__all__ = ["FORMS", "decay_amount"]


def _coupled(lr: Number, reference_lr: float, weight_decay: float) -> Number:
    return lr * weight_decay


def _decoupled(lr: Number, reference_lr: float, weight_decay: float) -> Number:
    return lr / reference_lr * weight_decay


def _corrected(lr: Number, reference_lr: float, weight_decay: float) -> Number:
    return lr * (lr / reference_lr) * weight_decay


FORMS: dict[str, Callable[[Number, float, float], Number]] = {"coupled": _coupled, "decoupled": _decoupled, "corrected": _corrected}


def decay_amount(form: str, lr: Number, reference_lr: float, weight_decay: float) -> Number:
    """Fraction by which one step shrinks a parameter.

    A reference of 0 means that no positive learning rate has been seen yet: then there is nothing to decay.
    """
    if form != "coupled" and reference_lr == 0:
        return 0.0
    return FORMS[form](lr, reference_lr, weight_decay)
