"""The conventions of weight decay, by their effect on a parameter in one step. `convert_weight_decay.py` converts values between them.

With alpha the reference (peak) learning rate and s = lr / alpha the schedule's multiplier, libraries mean different things by the same
`weight_decay=lambda`:

    l2          g <- g + lambda * theta                torch.optim.Adam and SGD, optimi.Adam's default: through the gradient

and decoupled from the gradient (Loshchilov & Hutter 2019): theta <- theta * (1 - amount) before each step, with

    coupled     amount = lr * lambda                   torch.optim.AdamW, optimi's default
    decoupled   amount = (lr / alpha) * lambda         Composer, optimi's decouple_lr, and the AdamW paper (its eta_t * lambda)
    corrected   amount = lr * (lr / alpha) * lambda    AdamC (Defazio 2025, arXiv 2506.02285)

alpha is the optimizer's own `reference_lr` in each param group. It is not `initial_lr` or `max_lr`: schedulers overwrite those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sharded_optim.formulas.scalars import Number, divide

__all__ = ["CORRECTED", "COUPLED", "DECOUPLED", "FORMS", "L2", "decay_amount", "decay_coefficients", "form_of"]

L2, COUPLED, DECOUPLED, CORRECTED = "l2", "coupled", "decoupled", "corrected"


def _coupled(lr: Number, reference_lr: float, weight_decay: float) -> Number:
    return lr * weight_decay


def _decoupled(lr: Number, reference_lr: float, weight_decay: float) -> Number:
    return divide(lr, reference_lr) * weight_decay


def _corrected(lr: Number, reference_lr: float, weight_decay: float) -> Number:
    return lr * divide(lr, reference_lr) * weight_decay


_AMOUNTS: dict[str, Callable[[Number, float, float], Number]] = {COUPLED: _coupled, DECOUPLED: _decoupled, CORRECTED: _corrected}
FORMS = (*_AMOUNTS, L2)


def form_of(*, decouple_wd: bool, decouple_lr: bool, decay_form: str | None = None) -> str:
    """Return `decay_form`, or, if it is None, the form that optimi's switches select.

    Raises:
        ValueError: `decay_form` contradicts `decouple_lr`.
    """
    if decay_form is None:
        return DECOUPLED if decouple_lr else COUPLED if decouple_wd else L2
    if decouple_lr and decay_form != DECOUPLED:
        raise ValueError(f"decouple_lr=True means decay_form={DECOUPLED!r}, got decay_form={decay_form!r}; give one of the two")
    return decay_form


def decay_coefficients(group: Mapping[str, Any], lr_scale: Number) -> tuple[Number, Number]:
    """Return (l2, decay) of a param group: a step uses the gradient grad + l2 * param, and multiplies param by decay first.

    `lr_scale` multiplies the learning rate. A reference_lr of 0 means that no positive learning rate has been seen yet: nothing decays.
    """
    if group["decay_form"] == L2:
        return group["weight_decay"], 1.0
    amount = decay_amount(group)
    return 0.0, 1.0 if amount is None else 1.0 - lr_scale * amount


def decay_amount(group: Mapping[str, Any]) -> Number | None:
    """Return the share by which a step shrinks a parameter; None without a reference yet. Not for L2, which acts through the gradient."""
    form, reference_lr = group["decay_form"], group["reference_lr"]
    if form != COUPLED and reference_lr == 0:
        return None
    return _AMOUNTS[form](group["lr"], reference_lr, group["weight_decay"])
