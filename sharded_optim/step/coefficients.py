"""Compute the coefficient table that a backend reads, from hyperparameters, step counters and learning-rate scales. Used by kernel calls.

Each param group's formula is recorded once, and again when a hyperparameter other than the learning rate changes. Backends evaluate
formulas in float64. Nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from operator import is_
from typing import Any

import torch
from torch import Tensor

from sharded_optim.backends import Backend, Operands
from sharded_optim.formulas import Coefficients
from sharded_optim.formulas.hyperparameters import comparable, on_host
from sharded_optim.formulas.recording import Formula, Formulas, Number, Recorder
from sharded_optim.formulas.scalars import Sums
from sharded_optim.storage.devices import DeviceCache, send

__all__ = ["GroupValues", "LrScale", "OperandGroups", "coefficient_table", "host_numbers"]

MUTABLE = object()  # placeholder for a value that can be changed in place, so that its identity proves nothing
IMMUTABLE = (bool, int, float, str, type(None), torch.dtype)
NOT_VALUES = ("params", "param_names")  # keys of a param group that are not hyperparameters


class GroupValues:
    """The hyperparameters of one param group, checked and converted once, and again when one of them changes.

    Schedulers and users write to param groups at any time. Every step compares the values by identity, which is fast. Only a group that
    has changed, or has values that can change in place (tensors, lists), is checked, converted and hashed again.

    Attributes:
        group: the param group; the reference keeps its id from being reused.
        numbers: the hyperparameters, as Python numbers where the host has them; lr may be a tensor on a device.
        compared: (name, value) of the hyperparameters that must be the same on all ranks.
    """

    def __init__(
        self,
        group: dict[str, Any],
        state_dtype: torch.dtype | str,
        compared: Collection[str],  # names of hyperparameters that must be the same on all ranks
    ) -> None:
        self.group = group
        self.numbers = host_numbers(_values_in(group))
        self._state_dtype = state_dtype
        self._keys = set(group)
        self._seen = {name: value if _is_immutable(value) else MUTABLE for name, value in _values_in(group).items()}
        self.compared = [(name, comparable(group[name])) for name in sorted(compared & group.keys())]
        self._options: Any = None
        self._text = b""  # `compared` and `_options` as text, the input of the hash

    def are_of(self, group: dict[str, Any], state_dtype: torch.dtype | str) -> bool:
        """Return whether this is the same group and its values are certainly unchanged."""
        return (
            group is self.group
            and state_dtype == self._state_dtype
            and group.keys() == self._keys
            and all(map(is_, map(group.get, self._seen), self._seen.values()))
        )

    def unchanged(self, group: dict[str, Any]) -> set[str]:
        """Return the names of a group's values that are certainly the same as these."""
        return {name for name, value in _values_in(group).items() if value is self._seen.get(name, MUTABLE)}

    def key(self, options: Any, step: float | None) -> int:
        """Hash compared hyperparameters, options and step to 64 bits, for the comparison between ranks."""
        if options != self._options:
            self._options, self._text = options, repr((self.compared, options)).encode()
        return int.from_bytes(blake2b(b"%b %r" % (self._text, step), digest_size=8).digest(), "little")


def _values_in(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in NOT_VALUES}


def _is_immutable(value: Any) -> bool:
    return isinstance(value, IMMUTABLE) or (type(value) is tuple and all(map(_is_immutable, value)))


def host_numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    """Convert hyperparameters, including host tensors, to Python numbers. A learning rate on a device stays a tensor."""
    numbers = {name: on_host(value) for name, value in group.items()}
    if "betas" in group:
        numbers["betas"] = tuple(map(float, group["betas"]))
    return numbers if isinstance(numbers["lr"], Tensor) else numbers | {"lr": float(numbers["lr"])}


OfMean = Callable[[Mapping[str, Any], Number], Number]  # see `Statistic.lr_scale`


@dataclass(frozen=True, kw_only=True)
class LrScale:
    """The learning-rate factor of each operand: a function of the mean of its tensor's statistic, and the sums that give the mean."""

    of_mean: OfMean
    sums: Sums


@dataclass(frozen=True, kw_only=True, eq=False)
class OperandGroups:
    """The hyperparameters of param groups, and the group of each operand.

    Attributes:
        groups: the hyperparameters of each group, as `host_numbers` returns them.
        group_of: index of each operand's group: int64 (operands,) on the device; None if there is only one group.
    """

    groups: Sequence[Mapping[str, Any]]
    group_of: Tensor | None = None
    _formulas: dict[Any, Formulas] = field(default_factory=dict)
    _sent_lr: DeviceCache[Tensor] = field(default_factory=DeviceCache)
    _lr_on_host: list[float] | None = field(init=False)  # learning rate of each group; None: one is on a device

    def __post_init__(self) -> None:
        rates = [group["lr"] for group in self.groups]
        object.__setattr__(self, "_lr_on_host", None if any(isinstance(lr, Tensor) for lr in rates) else rates)

    def having(self, groups: Sequence[Mapping[str, Any]]) -> OperandGroups:
        """Return a copy with new hyperparameters for the groups; it shares the recorded formulas unless more than lr differs."""
        alike = all(map(_equal_except_lr, groups, self.groups))
        return replace(self, groups=groups, _formulas=self._formulas if alike else {})

    def formulas(self, coefficients: Callable[..., Coefficients], lr_scale: float | OfMean | None) -> Formulas:
        """Return the coefficient formula of each group, recorded on first use; see `coefficient_table`."""
        key = coefficients, lr_scale
        if key not in self._formulas:
            self._formulas[key] = Formulas(tuple(_recorded(coefficients, group, lr_scale) for group in self.groups))
        return self._formulas[key]

    def lr(self, device: torch.device) -> Tensor:
        """Return the learning rate of each group: float64 (groups,) on the device."""
        rates = self._lr_on_host
        if rates is not None:
            return self._sent_lr.of(rates, device, lambda: send(torch.tensor(rates, dtype=torch.float64, device="cpu"), device))
        return torch.stack([_double(group["lr"], device) for group in self.groups])


def _double(lr: float | Tensor, device: torch.device) -> Tensor:
    """Return a learning rate on the device: float64 (). A number is written by a fill, because a copy from the host would wait."""
    if isinstance(lr, Tensor):
        return lr.detach().to(device, torch.float64).reshape(())
    return torch.full((), lr, dtype=torch.float64, device=device)


def _equal_except_lr(group: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two groups certainly have the same hyperparameters, apart from their learning rates."""
    return group.keys() == other.keys() and all(
        _is_immutable(value) and _is_immutable(other[name]) and value == other[name] for name, value in group.items() if name != "lr"
    )


def _recorded(coefficients: Callable[..., Coefficients], group: Mapping[str, Any], lr_scale: float | OfMean | None) -> Formula:
    """Record the coefficient formula of one group."""
    recorder = Recorder()
    numbers = {**group, "lr": recorder.input("lr")}
    arguments: list[Any] = [numbers, recorder.input("step")]
    if lr_scale is not None:
        arguments.append(lr_scale(numbers, Sums.recorded_mean(recorder)) if callable(lr_scale) else lr_scale)
    return recorder.formula(coefficients(*arguments))


def coefficient_table(
    coefficients: Callable[..., Coefficients],  # (hyperparameters, step) or (hyperparameters, step, lr_scale)
    members: OperandGroups,
    steps: Tensor,  # fp32 (operands,), steps taken so far
    lr_scale: float | LrScale | None = None,  # third argument of `coefficients`; None: it takes two
    *,
    backend: Backend,
    operands: Operands,
) -> Tensor:
    """Compute a row of coefficients for each operand: fp32 (operands, coefficients), computed in float64 and rounded once."""
    scale, sums = (lr_scale.of_mean, lr_scale.sums) if isinstance(lr_scale, LrScale) else (lr_scale, None)
    formulas = members.formulas(coefficients, scale)
    return backend.tabulate(operands, formulas, members.group_of, steps, sums, members.lr(steps.device))
