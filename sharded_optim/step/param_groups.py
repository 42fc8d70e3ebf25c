"""Keys of param groups: optimi's switches, parameter names, and the reference learning rate of weight decay.

Used when a group is added and when a state dict is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_optim.formulas.weight_decay import DECOUPLED, L2, form_of
from sharded_optim.storage.devices import known_on_host
from sharded_optim.storage.formats import FORMATS, chosen_format, state_formats

__all__ = [
    "check_state_dtype",
    "follow_names",
    "name_of_param",
    "named_params",
    "reference",
    "resolve_kahan",
    "set_reference_lr",
    "translate_switches",
    "warn_of_high_decay",
]

HIGH_DECAY = 1e-3  # Composer and optimi warn of a decoupled decay from this value on
BF16_HALF_ULP = 2.0**-8  # largest relative rounding error


def check_state_dtype(choice: torch.dtype | str, values: dict[str, Any], where: str) -> None:
    """Raise ValueError for a storage of the moments that would give silently wrong results."""
    known = choice in state_formats() if isinstance(choice, str) else choice in (torch.float32, torch.bfloat16)
    if not known:
        names = ", ".join(map(repr, state_formats()))
        raise ValueError(
            f"state_dtype must be torch.float32, torch.bfloat16 or the name of a storage format ({names}), got {choice}. In float16 a "
            f"second moment would overflow or vanish"
        )
    *_, beta2 = values.get("betas", (0.0, 0.0))
    if chosen_format(choice) is FORMATS["bf16"] and 1.0 - beta2 < BF16_HALF_ULP:
        raise ValueError(
            f"state_dtype=torch.bfloat16 needs beta2 <= {1.0 - BF16_HALF_ULP:.4f}, got {beta2} in {where}: a step would change the second "
            f"moment by less than its rounding error, so that it could never decrease; lower beta2 or keep the moments in float32"
        )


def translate_switches(group: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Translate optimi's keys of a group: `decouple_lr` and `decouple_wd` to `decay_form`, `beta1` and `beta2` to `betas`."""
    group = dict(group)
    decouple_lr, decouple_wd = group.pop("decouple_lr", None), group.pop("decouple_wd", None)
    if decouple_lr is not None or decouple_wd is not None:
        inherited = defaults["decay_form"]
        group["decay_form"] = form_of(
            decouple_wd=inherited != L2 if decouple_wd is None else decouple_wd,
            decouple_lr=inherited == DECOUPLED if decouple_lr is None else decouple_lr,
            decay_form=group.get("decay_form"),
        )
    if "betas" in defaults and ("beta1" in group or "beta2" in group):
        beta1, beta2 = group.get("betas", defaults["betas"])
        group["betas"] = (group.pop("beta1", beta1), group.pop("beta2", beta2))
    return group


def resolve_kahan(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Replace `kahan_sum=None` in a group by its meaning, in place: distributed checkpoints refuse None."""
    if group.get("kahan_sum", defaults["kahan_sum"]) is None:
        group["kahan_sum"] = not group.get("stochastic_rounding", defaults["stochastic_rounding"])


def warn_of_high_decay(groups: list[dict[str, Any]]) -> None:
    """Warn, once for all groups, if a fully decoupled decay has a value that is typical of a coupled one."""
    high = [group["weight_decay"] for group in groups if group["decay_form"] == DECOUPLED and group["weight_decay"] >= HIGH_DECAY]
    if high:
        warnings.warn(
            f"weight_decay={max(high)} is high for fully decoupled decay (decouple_lr=True, DecoupledAdamW, DecoupledSGDW): it is not "
            f"multiplied by the learning rate, so each step at the peak learning rate multiplies the weights by {1.0 - max(high):.6g}; "
            f"convert a coupled value with convert_weight_decay",
            UserWarning,
            stacklevel=6,
        )


def named_params(group: dict[str, Any], group_index: int) -> list[tuple[Any, str]]:
    """Return the tensors of a group, each with its name or, without one, its position."""
    return [
        (param[1], str(param[0])) if isinstance(param, tuple) else (param, name_of_param(group, group_index, index))
        for index, param in enumerate(group["params"])
    ]


def follow_names(group: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
    """Add positional names, in place, to groups without names if others have names: torch requires names in all groups or in none.

    Args:
        group: the group about to be added.
        groups: the existing groups.
    """
    everything = [*groups, group]
    filled = [each for each in everything if each["params"]]
    are_named = any("param_names" in each or isinstance(each["params"][0], tuple) for each in filled)
    for index, each in enumerate(everything):
        if not each["params"]:
            each.pop("param_names", None)
        if are_named and not (each["params"] and isinstance(each["params"][0], tuple)):
            each.setdefault("param_names", [name_of_param(each, index, row) for row in range(len(each["params"]))])


def name_of_param(group: Mapping[str, Any], group_index: int, index: int) -> str:
    """Return the name of a parameter, or its position if it has none."""
    names = group.get("param_names", ())
    if len(names) == len(group["params"]):  # otherwise there are no names, or a wrapper has replaced the parameters that they belong to
        return names[index]
    return f"param_groups[{group_index}].params[{index}]"


def reference(lr: float) -> dict[str, Any]:
    """Return the group entries that set the reference learning rate of decoupled weight decay; 0 means that it will be learned."""
    return {"reference_lr": lr, "learns_reference_lr": lr == 0.0}


def set_reference_lr(group: dict[str, Any], max_lr: float | None) -> None:
    """Set the reference learning rate of a new group, in place.

    It is the group's own `max_lr`; else the reference from an earlier time in an optimizer (Composer removes the groups and adds them
    again); else the optimizer's `max_lr`; else the group's current `lr`. It has a separate key because schedulers overwrite `initial_lr`
    and `max_lr` (OneCycleLR both). With neither `max_lr` nor a positive `lr` it is learned: the largest lr so far.
    """
    own = group.pop("max_lr", None)
    if own is None and {"reference_lr", "learns_reference_lr"} <= group.keys():
        return  # the group already has a reference
    group |= reference(float(own if own is not None else max_lr if max_lr is not None else group["lr"]))
    if group["learns_reference_lr"] and isinstance(group["lr"], Tensor) and not known_on_host(group["lr"]):
        raise ValueError("weight decay needs the peak learning rate, which a device tensor lr of 0 does not give; pass max_lr")
