"""Weight decay in all its conventions: what each does to a parameter in a step, and how their values convert.

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

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from sharded_optim.algorithms.scalars import Number, divide

__all__ = ["CORRECTED", "COUPLED", "DECOUPLED", "FORMS", "L2", "convert_weight_decay", "decay_coefficients", "form_of"]

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
    """The form that optimi's switches mean, or `decay_form` where it is given.

    Raises:
        ValueError: `decay_form` contradicts `decouple_lr`.
    """
    if decay_form is None:
        return DECOUPLED if decouple_lr else COUPLED if decouple_wd else L2
    if decouple_lr and decay_form != DECOUPLED:
        raise ValueError(f"decouple_lr=True means decay_form={DECOUPLED!r}, got decay_form={decay_form!r}; give one of the two")
    return decay_form


def decay_coefficients(group: Mapping[str, Any], lr_scale: Number) -> tuple[Number, Number]:
    """(l2, decay) of a param group: a step computes with grad + l2 * param, and multiplies param by decay first.

    `lr_scale` multiplies the learning rate. A reference of 0 means that no positive learning rate has been seen yet: nothing decays.
    """
    form, reference_lr, weight_decay = group["decay_form"], group["reference_lr"], group["weight_decay"]
    if form == L2:
        return weight_decay, 1.0
    if form != COUPLED and reference_lr == 0:
        return 0.0, 1.0
    return 0.0, 1.0 - lr_scale * _AMOUNTS[form](group["lr"], reference_lr, weight_decay)


# ------------------------------------------------------------------------------------------------------------------- conversion
# Every convention but L2 is a way to write d, the fraction by which a step at the peak learning rate shrinks a parameter.

ALIASES = {
    "torch": COUPLED,
    "optimi": COUPLED,
    "composer": DECOUPLED,
    "paper": DECOUPLED,
    "adamc": CORRECTED,
    "tau_iter": "ema_steps",
    "tau_epoch": "ema_epochs",
}
_SCALED_BY_LR = (COUPLED, CORRECTED)
_DURATIONS = ("half_life", "ema_steps", "ema_epochs")
CONVENTIONS = (*FORMS, *_DURATIONS)


def convert_weight_decay(
    value: float,
    from_: str,
    to: str,
    *,
    lr: float | None = None,
    to_lr: float | None = None,
    steps_per_epoch: float | None = None,
    width_multiplier: float = 1.0,
) -> float:
    """What `value` of one convention is in another, so that a step at the peak learning rate shrinks a parameter by the same fraction d.

    | convention | aliases | d |
    |---|---|---|
    | `coupled` | `torch`, `optimi` | lr * value |
    | `decoupled` | `composer`, `paper` | value |
    | `corrected` | `adamc` | lr * value |
    | `half_life`, in steps | | 1 - 2**(-1 / value) |
    | `ema_steps`, time scale of the moving average of updates (Wang & Aitchison 2024, arXiv 2405.13698) | `tau_iter` | 1 / value |
    | `ema_epochs`, the same in epochs | `tau_epoch` | 1 / (value * steps_per_epoch) |
    | `l2` | | no conversion but to itself, which changes nothing |

    Args:
        value: a weight decay >= 0, or a duration > 0 (which may be infinite: no decay).
        from_, to: conventions.
        lr: peak learning rate of `from_`, and of `to` unless `to_lr` says otherwise.
        to_lr: peak learning rate of `to`; doubling it halves a coupled value and leaves a decoupled one alone.
        steps_per_epoch: N; only for `ema_epochs`.
        width_multiplier: m of muP (Yang et al. 2022, arXiv 2203.03466), whose learning rate is lr / m at m times the width: the same as
            to_lr = lr / m. A coupled value is multiplied by m, a decoupled one stays.

    Raises:
        ValueError: `l2` from or to another: it goes through the moments, where no value does the same; a missing or wrong argument.

    Warns:
        UserWarning: `corrected` from or to another: it follows the square of a schedule, so they agree at the peak learning rate only.

    >>> convert_weight_decay(0.1, "torch", "composer", lr=6e-4)
    5.9999999999999995e-05
    >>> convert_weight_decay(0.1, "coupled", "coupled", width_multiplier=8)
    0.8
    """
    source, target = _convention("from_", from_), _convention("to", to)
    numbers = {"lr": lr, "to_lr": to_lr, "steps_per_epoch": steps_per_epoch, "width_multiplier": width_multiplier}
    for name, number in numbers.items():
        if number is not None and not (math.isfinite(number) and number > 0):
            raise ValueError(f"{name} must be a finite number > 0, got {number!r}")
    if (source in _DURATIONS and not value > 0) or not value >= 0 or (math.isinf(value) and source not in _DURATIONS):
        rule = "a number > 0" if source in _DURATIONS else "a finite number >= 0"
        raise ValueError(f"value must be {rule} for {from_!r}, got {value!r}")
    if L2 in (source, target):
        if source != target:
            raise ValueError(
                f"weight decay cannot be converted from {from_!r} to {to!r}: L2 goes through Adam's moments, which divide it by the size "
                f"of the gradient, so no value does the same; tune it anew"
            )
        return value
    if CORRECTED in (source, target) and source != target:
        warnings.warn(
            f"converted from {from_!r} to {to!r} at the peak learning rate only: corrected decay follows the square of the schedule",
            UserWarning,
            stacklevel=2,
        )
    if lr is None and to_lr is None and source in _SCALED_BY_LR and target in _SCALED_BY_LR:
        return value * width_multiplier  # whatever the learning rate
    d = _to_fraction(source, value, lr, steps_per_epoch)
    if not d < 1.0:
        raise ValueError(f"{value!r} of {from_!r} shrinks a parameter by {d} in one step, which leaves nothing of it; it must be below 1")
    target_lr = to_lr if to_lr is not None else lr
    return _from_fraction(target, d, None if target_lr is None else target_lr / width_multiplier, steps_per_epoch)


def _convention(argument: str, name: str) -> str:
    convention = ALIASES.get(name, name)
    if convention not in CONVENTIONS:
        raise ValueError(f"{argument} must be one of {', '.join((*CONVENTIONS, *ALIASES))}, got {name!r}")
    return convention


def _needed(name: str, number: float | None, convention: str) -> float:
    if number is None:
        raise ValueError(f"{name} is needed to convert from or to {convention!r}; pass {name}=")
    return number


def _to_fraction(convention: str, value: float, lr: float | None, steps_per_epoch: float | None) -> float:
    if convention in _SCALED_BY_LR:
        return _needed("lr", lr, convention) * value
    if convention == "half_life":
        return -math.expm1(-math.log(2) / value)
    if convention == "ema_steps":
        return 1 / value
    if convention == "ema_epochs":
        return 1 / (value * _needed("steps_per_epoch", steps_per_epoch, convention))
    return value


def _from_fraction(convention: str, d: float, lr: float | None, steps_per_epoch: float | None) -> float:
    if convention in _SCALED_BY_LR:
        return d / _needed("lr", lr, convention)
    if convention in _DURATIONS and d == 0:
        return math.inf
    if convention == "half_life":
        return math.log(2) / -math.log1p(-d)
    if convention == "ema_steps":
        return 1 / d
    if convention == "ema_epochs":
        return 1 / (d * _needed("steps_per_epoch", steps_per_epoch, convention))
    return d
