"""Convert weight decay values between the conventions of libraries.

Every convention except L2 is a way to express d, the fraction by which a step at the peak learning rate shrinks a parameter.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

from sharded_optim.formulas.weight_decay import CORRECTED, COUPLED, DECOUPLED, FORMS, L2

__all__ = ["convert_weight_decay"]

ALIASES = {
    "torch": COUPLED,
    "optimi": COUPLED,
    "composer": DECOUPLED,
    "paper": DECOUPLED,
    "adamc": CORRECTED,
    "tau_iter": "ema_steps",
    "tau_epoch": "ema_epochs",
}
Convention = Literal[
    "coupled",
    "torch",
    "optimi",
    "decoupled",
    "composer",
    "paper",
    "corrected",
    "adamc",
    "l2",
    "half_life",
    "ema_steps",
    "tau_iter",
    "ema_epochs",
    "tau_epoch",
]
_SCALED_BY_LR = (COUPLED, CORRECTED)
_DURATIONS = ("half_life", "ema_steps", "ema_epochs")
CONVENTIONS = (*FORMS, *_DURATIONS)


def convert_weight_decay(
    value: float,
    from_: Convention,
    to: Convention,
    *,
    lr: float | None = None,
    to_lr: float | None = None,
    steps_per_epoch: float | None = None,
    width_multiplier: float = 1.0,
) -> float:
    """Convert `value` from one convention to another, so that a step at the peak learning rate shrinks a parameter by the same fraction d.

    | convention | aliases | d |
    |---|---|---|
    | `coupled` | `torch`, `optimi` | lr * value |
    | `decoupled` | `composer`, `paper` | value |
    | `corrected` | `adamc` | lr * value |
    | `half_life`, in steps | | 1 - 2**(-1 / value) |
    | `ema_steps`, time scale of the moving average of updates (Wang & Aitchison 2024, arXiv 2405.13698) | `tau_iter` | 1 / value |
    | `ema_epochs`, the same in epochs | `tau_epoch` | 1 / (value * steps_per_epoch) |
    | `l2` | | converts only to itself |

    Args:
        value: a weight decay >= 0, or a duration > 0 (which may be infinite: no decay).
        from_, to: conventions.
        lr: peak learning rate of `from_`, and of `to` unless `to_lr` says otherwise.
        to_lr: peak learning rate of `to`; doubling it halves a coupled value and leaves a decoupled one alone.
        steps_per_epoch: number of steps in an epoch; only for `ema_epochs`.
        width_multiplier: m of muP (Yang et al. 2022, arXiv 2203.03466), whose learning rate is lr / m at m times the width: the same as
            to_lr = lr / m. A coupled value is multiplied by m, a decoupled value stays.

    Raises:
        ValueError: a conversion between `l2` and another convention, for which there is no equivalent value, as L2 decay goes through the
            moments; a missing or wrong argument.

    Warns:
        UserWarning: a conversion between `corrected` and another convention: corrected decay follows the square of the schedule, so the two
            agree at the peak learning rate only.

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
        return value * width_multiplier  # the learning rate cancels
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
