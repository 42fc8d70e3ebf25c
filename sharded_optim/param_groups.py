"""What a param group may hold: hyperparameters are checked here, and the reference learning rate of weight decay is chosen and kept.

Used by the engine when a group is added and when a state dict is loaded.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from sharded_optim.algorithms.weight_decay import FORMS

__all__ = ["check_hyperparameters", "check_number", "named_params", "set_reference_lr"]


def check_number(name: str, value: Any, where: str = "") -> float:
    """`value` as a float, if it is a finite number >= 0."""
    number = float(value)
    if not (math.isfinite(number) and number >= 0.0):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}{where}")
    return number


def check_hyperparameters(values: dict[str, Any], where: str) -> None:
    """Raise ValueError for a hyperparameter that no step could use; keys that are absent or unknown pass."""
    where = f" in {where}"
    for name in ("lr", "eps", "weight_decay", "max_lr"):
        if values.get(name) is not None:
            check_number(name, values[name], where)
    if isinstance(values.get("lr"), Tensor) and values["lr"].numel() != 1:
        raise ValueError(f"a tensor lr must have one element, got shape {tuple(values['lr'].shape)}{where}")
    if "betas" in values:
        betas = tuple(values["betas"])
        if len(betas) != 2 or not all(0.0 <= float(beta) < 1.0 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {values['betas']!r}{where}")
    if values.get("decay_form", "coupled") not in FORMS:
        raise ValueError(f"decay_form must be one of {', '.join(FORMS)}, got {values['decay_form']!r}{where}")


def named_params(group: dict[str, Any], group_index: int) -> list[tuple[Any, str]]:
    """The tensors of a group, added or about to be, each with the user's name for it or its position."""
    params = group["params"]
    names = group.get("param_names") or [
        str(param[0]) if isinstance(param, tuple) else f"param_groups[{group_index}].params[{index}]" for index, param in enumerate(params)
    ]
    return [(param[1] if isinstance(param, tuple) else param, name) for param, name in zip(params, names, strict=True)]


def set_reference_lr(group: dict[str, Any], max_lr: float | None) -> None:
    """Give a new group the learning rate that the decoupled forms of weight decay divide by.

    It is the group's own `max_lr`, else the optimizer's, else the group's `lr` at this moment. It lives under a key of its own: schedulers
    overwrite `initial_lr` and `max_lr` (OneCycleLR both). With neither `max_lr` nor a positive `lr` it is learned: the largest lr so far.
    """
    own = group.pop("max_lr", None)
    reference = own if own is not None else max_lr
    if reference is None:
        reference = float(group["lr"])
    group["reference_lr"] = float(reference)
    group["learns_reference_lr"] = reference == 0.0
    if group["learns_reference_lr"] and isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu":
        raise ValueError("a device tensor lr of 0 does not tell the peak learning rate that weight decay refers to; pass max_lr")
