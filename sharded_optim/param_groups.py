"""What a param group may hold: hyperparameters are checked here, and the reference learning rate of weight decay is chosen and kept.

Used by the engine when a group is added, when a state dict is loaded, and before each step.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from sharded_optim.algorithms.weight_decay import DECOUPLED, FORMS, L2, form_of
from sharded_optim.coefficients import host_value, known_on_host
from sharded_optim.formats import FORMATS, chosen_format

__all__ = [
    "HYPERPARAMETERS",
    "check_hyperparameters",
    "check_number",
    "check_state_dtype",
    "hyperparameter_key",
    "learn_reference_lr",
    "name_of_param",
    "named_params",
    "reference",
    "resolve_kahan",
    "set_reference_lr",
    "translate_switches",
    "warn_of_high_decay",
]

NUMBERS = ("lr", "eps", "weight_decay", "max_lr", "momentum", "dampening", "reference_lr")  # hyperparameters that are numbers >= 0
CHOICES = ("decay_form", "amsgrad", "nesterov", "kahan_sum", "stochastic_rounding", "rounding_seed")  # those that are not
# What the optimizers of this library use of a group. `max_lr` became the reference when the group was added; schedulers write it again.
HYPERPARAMETERS = frozenset({*NUMBERS, *CHOICES, "betas", "learns_reference_lr"} - {"max_lr"})
HIGH_DECAY = 1e-3  # from which on Composer and optimi warn
BF16_HALF_ULP = 2.0**-8  # relative, at worst
LR_ROUNDING = 1e-12
LARGEST_EXACT = 2**53  # of integers as floats


def _on_host(value: Any) -> Any:
    """A hyperparameter, if it is a tensor of one element that the host has, as a number."""
    return host_value(value) if isinstance(value, Tensor) and value.numel() == 1 and known_on_host(value) else value


def check_number(name: str, value: Any, where: str = "") -> float:
    """`value` as a float, if it is a finite number >= 0."""
    try:
        number = math.nan if isinstance(value, str) else float(_on_host(value))
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0.0):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}{where}")
    return number


def check_hyperparameters(values: dict[str, Any], where: str, *, names: frozenset[str] = frozenset(), scheduled: bool = False) -> None:
    """Raise ValueError for a hyperparameter that no step could use, or that asks for what no step does. Other keys pass.

    Args:
        names: of all hyperparameters of the optimizer. Of those that are not known here, the numbers must be finite.
        scheduled: the values may come from a scheduler, whose roundings can take an lr just below 0 (CosineAnnealingLR at its end).
    """
    where = f" in {where}"
    lr = values.get("lr")
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"a tensor lr must have one element, got shape {tuple(lr.shape)}{where}")
    for name in NUMBERS:
        value = values.get(name)
        if value is None:
            if name in values and name != "max_lr":
                raise ValueError(f"{name} must be a finite number >= 0, got None{where}")
        elif not isinstance(value, Tensor) or value.device.type == "cpu":  # a device's is not waited for
            value = _on_host(value)
            rounded = scheduled and name in ("lr", "max_lr") and isinstance(value, Real) and -LR_ROUNDING < float(value) < 0
            check_number(name, 0.0 if rounded else value, where)
        elif name not in ("lr", "max_lr"):
            raise ValueError(f"{name} must be a number, got a tensor on {value.device}{where}: only lr may lie on a device")
    if "betas" in values:
        betas = values["betas"]
        if isinstance(betas, list | tuple) and any(isinstance(beta, Tensor) and not known_on_host(beta) for beta in betas):
            raise ValueError(f"betas must be numbers, got a tensor on a device{where}: only lr may lie on one")
        if not isinstance(betas, list | tuple) or not betas or not all(_is_below_1(beta) for beta in betas):
            raise ValueError(f"betas must be numbers in [0, 1), got {betas!r}{where}")
    if values.get("decay_form", "coupled") not in FORMS:
        raise ValueError(f"decay_form must be one of {', '.join(FORMS)}, got {values['decay_form']!r}{where}")
    for name in values.keys() & names - HYPERPARAMETERS - {"max_lr"}:
        _check_other(name, values[name], where)
    for name in ("maximize", "differentiable"):  # torch's; others of its keys do not change the result
        if values.get(name):
            raise ValueError(f"{name}={values[name]!r} is not supported{where}; leave it out")


def _is_below_1(beta: Any) -> bool:
    try:
        return check_number("beta", beta) < 1.0
    except ValueError:
        return False


def _check_other(name: str, value: Any, where: str) -> None:
    """Raise ValueError unless a hyperparameter of an optimizer outside of this library can be used, and compared between ranks."""
    if isinstance(value, Tensor) and not known_on_host(value):
        raise ValueError(f"{name} must be known on the host, got a tensor on {value.device}{where}: only lr may lie on a device")
    try:
        comparable = _comparable(value)
    except TypeError:
        raise ValueError(f"{name} must be a number, a string, or a list or dict of them, got {value!r}{where}") from None
    if not all(map(math.isfinite, _numbers_in(comparable))):
        raise ValueError(f"{name} must be finite, got {value!r}{where}")


def _comparable(value: Any) -> Any:
    """A hyperparameter as numbers, strings and lists of them, equal on two ranks if its values are.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, Tensor) and not known_on_host(value):
        return -1.0  # a device's is not waited for
    if isinstance(value, list | tuple):
        return list(map(_comparable, value))
    if isinstance(value, dict):
        return [[key, _comparable(value[key])] for key in sorted(value)]
    value = value.tolist() if hasattr(value, "tolist") else value  # of torch and NumPy: numbers, or lists of them
    if value is None or isinstance(value, str | list):
        return value
    if isinstance(value, int) and abs(value) > LARGEST_EXACT:
        return value
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"{type(value).__name__} cannot be compared between ranks")


def _numbers_in(comparable: Any) -> Iterator[float]:
    if isinstance(comparable, list):
        for item in comparable:
            yield from _numbers_in(item)
    elif comparable is not None and not isinstance(comparable, str):
        yield comparable


def check_state_dtype(choice: torch.dtype | str, values: dict[str, Any], where: str) -> None:
    """Raise ValueError for a storage of the moments that would be silently wrong."""
    known = choice in FORMATS if isinstance(choice, str) else choice in (torch.float32, torch.bfloat16)
    if not known or chosen_format(choice).dtype == torch.float16:
        names = ", ".join(repr(name) for name, fmt in FORMATS.items() if fmt.dtype != torch.float16)
        raise ValueError(
            f"state_dtype must be torch.float32 or torch.bfloat16, got {choice}: a second moment overflows or vanishes in float16. Or it "
            f"is the name of a storage format: {names}"
        )
    *_, beta2 = values.get("betas", (0.0, 0.0))
    if chosen_format(choice) is FORMATS["bf16"] and 1.0 - beta2 < BF16_HALF_ULP:
        raise ValueError(
            f"state_dtype=torch.bfloat16 needs beta2 <= {1.0 - BF16_HALF_ULP:.4f}, got {beta2} in {where}: a step would change the second "
            f"moment by less than its rounding, so that it never falls; lower beta2 or keep the moments in float32"
        )


def hyperparameter_key(hyperparameters: Mapping[str, Any], step: float) -> int:
    """24 bits that two ranks have in common if these hyperparameters and the step are the same on both."""
    values = [(name, _comparable(hyperparameters[name])) for name in sorted(hyperparameters)]
    return zlib.crc32(repr((values, step)).encode()) & 0xFFFFFF


def translate_switches(group: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A group with optimi's keys in our terms: `decouple_lr` and `decouple_wd` as `decay_form`, `beta1` and `beta2` as `betas`."""
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
    """Write what `kahan_sum=None` means for a group: distributed checkpoints refuse None."""
    if group.get("kahan_sum", defaults["kahan_sum"]) is None:
        group["kahan_sum"] = not group.get("stochastic_rounding", defaults["stochastic_rounding"])


def warn_of_high_decay(groups: list[dict[str, Any]]) -> None:
    """Warn once of fully decoupled decays, over all groups, that would be usual as coupled ones."""
    high = [group["weight_decay"] for group in groups if group["decay_form"] == DECOUPLED and group["weight_decay"] >= HIGH_DECAY]
    if high:
        warnings.warn(
            f"weight_decay={max(high)} is high for fully decoupled decay (decouple_lr=True, DecoupledAdamW, DecoupledSGDW): it is not "
            f"multiplied by the learning rate, so each step at the peak learning rate multiplies the weights by {1.0 - max(high):.6g}; "
            f"convert a coupled value with convert_weight_decay",
            UserWarning,
            stacklevel=5,
        )


def named_params(group: dict[str, Any], group_index: int) -> list[tuple[Any, str]]:
    """The tensors of a group, added or about to be, each with the user's name for it or its position."""
    return [
        (param[1], str(param[0])) if isinstance(param, tuple) else (param, name_of_param(group, group_index, index))
        for index, param in enumerate(group["params"])
    ]


def name_of_param(group: Mapping[str, Any], group_index: int, index: int) -> str:
    """The user's name of a parameter of a group that was added, or its position."""
    names = group.get("param_names", ())
    if len(names) == len(group["params"]):  # else none are given, or a wrapper put others in the place of those that they are for
        return names[index]
    return f"param_groups[{group_index}].params[{index}]"


def reference(lr: float) -> dict[str, Any]:
    """The keys of a group that say which learning rate the decoupled forms of weight decay divide by; 0 is one that is to be learned."""
    return {"reference_lr": lr, "learns_reference_lr": lr == 0.0}


def set_reference_lr(group: dict[str, Any], max_lr: float | None) -> None:
    """Give a new group its reference learning rate.

    It is the group's own `max_lr`, else what it brings from having been a group before (Composer clears and adds them again), else the
    optimizer's, else the group's `lr` at this moment. It lives under a key of its own: schedulers overwrite `initial_lr` and `max_lr`
    (OneCycleLR both). With neither `max_lr` nor a positive `lr` it is learned: the largest lr so far.
    """
    own = group.pop("max_lr", None)
    if own is None and {"reference_lr", "learns_reference_lr"} <= group.keys():
        return  # it was a group before
    group |= reference(float(own if own is not None else max_lr if max_lr is not None else group["lr"]))
    if group["learns_reference_lr"] and isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu":
        raise ValueError("a device tensor lr of 0 does not tell the peak learning rate that weight decay refers to; pass max_lr")


def learn_reference_lr(group: dict[str, Any]) -> None:
    """Keep the largest learning rate so far as the reference, in a group that was given none."""
    if group["learns_reference_lr"]:
        group["reference_lr"] = max(group["reference_lr"], float(_on_host(group["lr"])))
